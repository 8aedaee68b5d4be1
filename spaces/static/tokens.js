// Token files as dualcodebook_hf/tokens/file.py writes and reads them: safetensors, image k under "NNNN.tokens",
// uint16 (codebooks, h, w), and JSON under the metadata entry "dualcodebook_tokens".

const METADATA_KEY = "dualcodebook_tokens";
const FORMAT_VERSION = 1;
const LONGEST_NAME = 255; // bytes

/** Bytes that h x w positions take, densely packed. */
export function tokenBytes(h, w, bitsPerPosition) {
  return Math.ceil((h * w * bitsPerPosition) / 8);
}

/**
 * One image's tokens as a file.
 *
 * tokenizer: what onnx/tokenizer.json says. name: the image's file name. height, width: of the image.
 * tokens: Uint16Array (codebooks * h * w). Returns a Uint8Array.
 */
export function writeTokens(tokenizer, { name, height, width, tokens }) {
  const [h, w] = gridOf(height, width, tokenizer.downsample_factor);
  const description = {
    format_version: FORMAT_VERSION,
    downsample_factor: tokenizer.downsample_factor,
    books: tokenizer.codebooks,
    config_hash: tokenizer.config_hash,
    weights_sha256: tokenizer.weights_sha256,
    pictures: [{ name: fileName(name), height, width }],
  };
  const header = JSON.stringify({
    __metadata__: { [METADATA_KEY]: JSON.stringify(description) },
    "0000.tokens": { dtype: "U16", shape: [tokenizer.codebooks.length, h, w], data_offsets: [0, 2 * tokens.length] },
  });
  const text = new TextEncoder().encode(header);
  const length = Math.ceil(text.length / 8) * 8; // the tensors begin at a multiple of 8
  const file = new Uint8Array(8 + length + 2 * tokens.length).fill(32, 8, 8 + length);
  const view = new DataView(file.buffer);
  view.setBigUint64(0, BigInt(length), true);
  file.set(text, 8);
  tokens.forEach((id, index) => view.setUint16(8 + length + 2 * index, id, true));
  return file;
}

/**
 * The images of a token file: [{name, height, width, h, w, tokens}].
 *
 * buffer: ArrayBuffer. Throws an Error in plain words for anything that this tokenizer cannot decode.
 */
export function readTokens(tokenizer, buffer) {
  const { header, start } = parseHeader(buffer);
  const description = describe(header);
  checkTokenizer(tokenizer, description);
  return description.pictures.map((picture, index) => {
    const entry = header[`${String(index).padStart(4, "0")}.tokens`];
    return readImage(tokenizer, buffer, start, picture, entry);
  });
}

function parseHeader(buffer) {
  try {
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    if (!(length > 0 && length <= buffer.byteLength - 8)) throw new Error("length");
    return { header: JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length))), start: 8 + length };
  } catch {
    throw new Error("it is not a token file, or damaged");
  }
}

function describe(header) {
  let description = null;
  try {
    description = JSON.parse(header.__metadata__[METADATA_KEY]);
  } catch {
    throw new Error("it is not a token file");
  }
  if (description?.format_version !== FORMAT_VERSION) {
    throw new Error(`it has format version ${description?.format_version}; this page reads ${FORMAT_VERSION}`);
  }
  if (!Array.isArray(description.pictures) || !description.pictures.length) throw new Error("it holds no picture");
  return description;
}

function checkTokenizer(tokenizer, description) {
  const fits =
    description.config_hash === tokenizer.config_hash &&
    description.downsample_factor === tokenizer.downsample_factor &&
    JSON.stringify(description.books) === JSON.stringify(tokenizer.codebooks);
  if (!fits) throw new Error("its tokens were made by another model than this page's");
  const { weights_sha256: theirs } = description;
  if (theirs && tokenizer.weights_sha256 && theirs !== tokenizer.weights_sha256) {
    throw new Error("its tokens were made with other weights than this page's");
  }
}

function readImage(tokenizer, buffer, start, { name, height, width }, entry) {
  const isSide = (side) => Number.isInteger(side) && side > 0;
  if (!isSide(height) || !isSide(width)) throw new Error("a picture in it has no size");
  const [h, w] = gridOf(height, width, tokenizer.downsample_factor);
  const shape = [tokenizer.codebooks.length, h, w];
  const count = shape[0] * h * w;
  const [begin, end] = entry?.data_offsets ?? [];
  const whole = entry?.dtype === "U16" && JSON.stringify(entry.shape) === JSON.stringify(shape);
  if (!whole || end - begin !== 2 * count || !(begin >= 0) || start + end > buffer.byteLength) {
    throw new Error(`the tokens of “${name}” are damaged, or not those of ${width} × ${height} pixels`);
  }
  const view = new DataView(buffer, start + begin, 2 * count);
  const tokens = Uint16Array.from({ length: count }, (_, index) => view.getUint16(2 * index, true));
  tokenizer.codebooks.forEach(([codebook, size], index) => {
    if (tokens.subarray(index * h * w, (index + 1) * h * w).some((id) => id >= size)) {
      throw new Error(`“${name}” has tokens that the ${codebook} codebook does not have`);
    }
  });
  return { name: fileName(String(name)), height, width, h, w, tokens };
}

/** [h, w] of the tokens of an image. */
export function gridOf(height, width, factor) {
  return [Math.ceil(height / factor), Math.ceil(width / factor)];
}

/** A name without folders, short enough for every file system. */
export function fileName(name) {
  let short = name.replace(/[/\\\0]/g, "-").replace(/^\.{0,2}$/, "image");
  while (new TextEncoder().encode(short).length > LONGEST_NAME) short = [...short].slice(1).join("");
  return short;
}
