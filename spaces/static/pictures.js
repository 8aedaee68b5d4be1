// Image files to pixels, and what is drawn of tokens.

const LONGEST_SIDE = 16_000; // of a canvas, in every browser
const LARGEST_FILE = 400e6; // pixels that are decoded before they are shrunk

/**
 * Any image file the browser knows -> {name, width, height, fileSize: [W, H], bytes, pixels}.
 *
 * It is turned as its EXIF data say, laid over white and shrunk to at most `maxPixels`; `size`: [W, H] to fill and crop to.
 * pixels: Uint8ClampedArray RGBA. Throws an Error in plain words.
 */
export async function readPicture(blob, name, { maxPixels, size }) {
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error(blob.size ? "it is damaged, or no image that this browser can read" : "the file is empty");
  }
  try {
    const fileSize = [bitmap.width, bitmap.height];
    if (fileSize[0] * fileSize[1] > LARGEST_FILE) throw new Error("it has too many pixels for a browser");
    const [width, height] = size ?? sizeWithin(...fileSize, maxPixels);
    if (Math.max(width, height) > LONGEST_SIDE) throw new Error("it is too long for a browser");
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.fillStyle = "white";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    const scale = size ? Math.max(width / fileSize[0], height / fileSize[1]) : 0;
    const drawn = size ? fileSize.map((side) => side * scale) : [width, height];
    context.drawImage(bitmap, (width - drawn[0]) / 2, (height - drawn[1]) / 2, ...drawn);
    return { name, width, height, fileSize, bytes: blob.size, pixels: context.getImageData(0, 0, width, height).data };
  } finally {
    bitmap.close();
  }
}

function sizeWithin(width, height, maxPixels) {
  if (width * height <= maxPixels) return [width, height];
  const scale = Math.sqrt(maxPixels / (width * height));
  const sides = [width, height].map((side) => Math.max(1, Math.trunc(side * scale)));
  if (sides[0] === 1) return [1, Math.min(sides[1], maxPixels)];
  return sides[1] === 1 ? [Math.min(sides[0], maxPixels), 1] : sides;
}

/** Draws ids (h * w) on a canvas, one pixel a token, in `colours` [r, g, b] of each code; those that are not `bright` fade. */
export function drawTokens(canvas, ids, h, w, colours, bright = null) {
  canvas.width = w;
  canvas.height = h;
  const image = new ImageData(w, h);
  ids.forEach((id, index) => {
    image.data.set([...colours[id], bright === null || id === bright ? 255 : 60], 4 * index);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Draws RGBA pixels on a canvas of their size. */
export function drawPixels(canvas, pixels, width, height) {
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}
