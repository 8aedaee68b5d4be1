// The tokenizer, off the page's thread: onnxruntime-web on WebGPU where there is one, else on WASM.
//
// Messages: {id, task: "load" | "encode" | "decode", ...} -> {id, result} or {id, error}; {progress: [done, all]} between.

const RUNTIMES = {
  webgpu: { module: "./ort/ort.webgpu.min.mjs", binary: "ort-wasm-simd-threaded.asyncify" },
  wasm: { module: "./ort/ort.wasm.min.mjs", binary: "ort-wasm-simd-threaded" },
};
let ort = null;
let sessions = null;

const tasks = { load, encode, decode };

let last = Promise.resolve(); // one at a time: a session cannot run twice at once

self.onmessage = ({ data }) => {
  last = last.then(() => answer(data));
};

async function answer(data) {
  try {
    const { result, transfer } = await tasks[data.task](data);
    self.postMessage({ id: data.id, result }, transfer ?? []);
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error?.message ?? error) });
  }
}

async function load({ sizes, only }) {
  const runtime = only ?? ((await hasWebGPU()) ? "webgpu" : "wasm");
  try {
    await start(runtime, sizes);
  } catch (error) {
    if (runtime === "wasm") throw error;
    console.warn("WebGPU failed, WASM is used instead:", error);
    await start("wasm", sizes);
    return { result: { runtime: "wasm", threads: ort.env.wasm.numThreads, fallback: true } };
  }
  return { result: { runtime, threads: ort.env.wasm.numThreads } };
}

async function hasWebGPU() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return Boolean(adapter?.features.has("shader-f16"));
  } catch {
    return false;
  }
}

async function start(runtime, sizes) {
  const { module, binary } = RUNTIMES[runtime];
  const names = [`ort/${binary}.wasm`, "onnx/encoder_model_fp16.onnx", "onnx/decoder_model_fp16.onnx"];
  const all = names.reduce((sum, name) => sum + sizes[name], 0);
  let done = 0;
  const count = (bytes) => self.postMessage({ progress: [(done += bytes), all] });
  const [wasm, ...graphs] = await Promise.all(names.map((name) => fetchBytes(name, count)));
  ort = await import(module);
  // Threads need shared memory, which a browser gives to pages with the headers of README.md alone.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  ort.env.wasm.wasmPaths = { mjs: new URL(`./ort/${binary}.mjs`, import.meta.url).href };
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.logLevel = "error";
  const options = { executionProviders: [runtime], graphOptimizationLevel: "all" };
  sessions = [];
  for (const graph of graphs) sessions.push(await ort.InferenceSession.create(graph, options));
  if (runtime === "wasm") return;
  // What a driver cannot do fails here, while there is another way.
  const planes = new Float32Array(3 * 16 * 16);
  const { tokens } = await sessions[0].run({ pixel_values: new ort.Tensor("float32", planes, [1, 3, 16, 16]) });
  await run(1, { tokens: new ort.Tensor("int64", await tokens.getData(), tokens.dims) });
}

async function fetchBytes(name, count) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status})`);
  const parts = [];
  let length = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    count(value.length);
  }
  const bytes = new Uint8Array(length);
  parts.reduce((offset, part) => (bytes.set(part, offset), offset + part.length), 0);
  return bytes;
}

async function run(index, feeds) {
  const results = await sessions[index].run(feeds);
  const [name] = sessions[index].outputNames;
  const data = await results[name].getData();
  results[name].dispose?.();
  return data;
}

function tokenTensor(tokens, batch, h, w) {
  const codebooks = tokens.length / (batch * h * w);
  return new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [batch, codebooks, h, w]);
}

/** RGBA pixels -> Uint16Array tokens and the seconds that it took. */
async function encode({ pixels, width, height }) {
  const began = performance.now();
  const count = width * height;
  const planes = new Float32Array(3 * count);
  for (let index = 0; index < count; index++) {
    for (let channel = 0; channel < 3; channel++) {
      planes[channel * count + index] = (pixels[4 * index + channel] / 255) * 2 - 1;
    }
  }
  const ids = await run(0, { pixel_values: new ort.Tensor("float32", planes, [1, 3, height, width]) });
  const tokens = Uint16Array.from(ids, Number);
  return { result: { tokens, seconds: (performance.now() - began) / 1000 }, transfer: [tokens.buffer] };
}

/**
 * Tokens (batch * codebooks * h * w) -> RGBA pixels (batch, height, width), cropped, the seconds that it took, and the PSNR
 * beside `original`, RGBA pixels, of the values before they are rounded.
 */
async function decode({ tokens, batch = 1, h, w, height, width, original }) {
  const began = performance.now();
  const planes = await run(1, { tokens: tokenTensor(tokens, batch, h, w) });
  const seconds = (performance.now() - began) / 1000;
  const side = Math.round(Math.sqrt(planes.length / (3 * batch * w * h)));
  const [rows, columns] = [h * side, w * side];
  const pixels = new Uint8ClampedArray(4 * batch * height * width).fill(255);
  let error = 0;
  for (let image = 0, place = 0; image < batch; image++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++, place += 4) {
        for (let channel = 0; channel < 3; channel++) {
          const value = planes[((image * 3 + channel) * rows + y) * columns + x];
          const held = Math.min(Math.max((value + 1) / 2, 0), 1);
          pixels[place + channel] = Math.round(held * 255);
          if (original) error += (held - original[place + channel] / 255) ** 2;
        }
      }
    }
  }
  const psnr = original ? -10 * Math.log10(Math.max(error / (3 * height * width), 1e-10)) : null;
  return { result: { pixels, seconds, psnr }, transfer: [pixels.buffer] };
}
