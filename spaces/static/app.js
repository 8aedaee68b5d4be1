// The page: what a visitor does, and what is shown then. The work is done in worker.js.

import { drawPixels, drawTokens, readPicture } from "./pictures.js";
import { fileName, gridOf, readTokens, tokenBytes, writeTokens } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const MOST_UNDO = 50;
const SMALLEST_SHOWN = 384; // CSS pixels of the longer side; smaller pictures are enlarged by whole factors
const SMALLEST_TAGGED = [200, 48]; // CSS pixels in which the words "picture" and "from tokens" have room
const ALONE = 3; // a code alone is the middle of so many of it, a side
const LARGEST_DECODED = 4 * 2 ** 20; // pixels of a token file’s picture: minutes on a CPU

// picture: {name, width, height, pixels?, bytes?, fileSize?}; without pixels it came from a token file.
const state = { tokenizer: null, colours: null, picture: null, tokens: null, fresh: null, h: 0, w: 0, undo: [], cell: null, only: "" };
const brush = { blob: null, name: "", tokens: null };
let generation = 0; // of the picture that is shown: what comes for an older one is dropped
let jobs = 0;

// --- the worker

const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
worker.onmessage = ({ data }) => {
  if (data.progress) return showProgress(...data.progress);
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data.result);
};
worker.onerror = (event) => {
  for (const { reject } of waiting.values()) reject(new Error(event.message || "the worker could not be started"));
  waiting.clear();
};

function ask(task, options) {
  const id = crypto.randomUUID();
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, task, ...options });
  });
}

// --- waiting and errors

function showProgress(done, all) {
  $("progress").value = done / all;
  $("status").textContent = `Loading the tokenizer: ${(done / 1e6).toFixed(0)} of ${(all / 1e6).toFixed(0)} MB`;
}

function say(text) {
  $("status").textContent = text;
}

function fail(text) {
  $("error-text").textContent = text;
  $("error").hidden = false;
}

/** Runs a job with the page marked as busy; an error is shown, and what was shown before stays. */
async function busy(text, job, about = "") {
  jobs += 1;
  document.body.classList.add("busy");
  $("work").setAttribute("aria-busy", "true");
  say(text);
  try {
    const result = await job();
    $("error").hidden = true;
    return result;
  } catch (error) {
    console.warn(error);
    fail(about ? `“${about}” cannot be used: ${error.message}.` : `Something went wrong: ${error.message}.`);
    return null;
  } finally {
    jobs -= 1;
    if (!jobs) {
      document.body.classList.remove("busy");
      $("work").removeAttribute("aria-busy");
      say(state.tokens ? `Showing “${state.picture.name}”.` : "Choose a picture.");
    }
  }
}

// --- from pictures and token files to what is shown

const maxPixels = () => Number($("max-pixels").value);

async function openFile(blob, name) {
  if (/\.safetensors$/i.test(name)) return openTokens(blob, name);
  const shown = await busy(`Reading “${name}”…`, async () => {
    const picture = await readPicture(blob, name, { maxPixels: maxPixels() });
    picture.blob = blob;
    say(`“${name}”: picture to tokens…`);
    const mine = ++generation;
    const { tokens, seconds } = await ask("encode", picture);
    if (mine !== generation) return false;
    picture.seconds = seconds;
    await show(picture, tokens);
    return true;
  }, name);
  if (shown && brush.blob) await readBrush(brush.blob, brush.name);
}

async function openTokens(blob, name) {
  await busy(`Reading “${name}”…`, async () => {
    const images = readTokens(state.tokenizer, await blob.arrayBuffer());
    const choice = $("choice");
    choice.replaceChildren(...images.map((image, index) => new Option(image.name, index)));
    $("choice-label").hidden = images.length < 2;
    choice.onchange = () => busy("Decoding…", () => showImage(images[choice.value]), images[choice.value].name);
    await showImage(images[0]);
  }, name);
  if (brush.blob) await readBrush(brush.blob, brush.name);
}

async function showImage({ name, width, height, tokens }) {
  if (width * height > LARGEST_DECODED) {
    throw new Error(`its picture has ${width} × ${height} pixels, and this page decodes no more than four megapixels`);
  }
  generation += 1;
  await show({ name, width, height }, tokens);
}

async function show(picture, tokens) {
  const [h, w] = gridOf(picture.height, picture.width, state.tokenizer.downsample_factor);
  const before = { ...state };
  Object.assign(state, { picture, tokens, fresh: tokens.slice(), h, w, undo: [], cell: null });
  try {
    await decode();
  } catch (error) {
    Object.assign(state, before); // what is shown stays
    throw error;
  }
  brush.tokens = null;
  $("cell").hidden = true;
  if (picture.pixels) $("choice-label").hidden = true;
  $("work").hidden = false;
  layStage();
  drawMaps();
  updateTools();
  selectCell(Math.floor(h / 2), Math.floor(w / 2));
}

async function decode() {
  const { picture, h, w } = state;
  const mine = generation;
  const result = await ask("decode", {
    tokens: tokensToDecode(),
    h,
    w,
    height: picture.height,
    width: picture.width,
    original: picture.pixels ?? null,
  });
  if (mine !== generation) return;
  state.decoded = result;
  drawPixels($("decoded"), result.pixels, picture.width, picture.height);
  showNumbers();
}

/** With one codebook alone, every other one's tokens are its mean: the number after its last. */
function tokensToDecode() {
  const tokens = state.tokens.slice();
  state.tokenizer.codebooks.forEach(([name, size], index) => {
    if (state.only && state.only !== name) plane(tokens, index).fill(size);
  });
  return tokens;
}

const plane = (tokens, index) => tokens.subarray(index * state.h * state.w, (index + 1) * state.h * state.w);

// --- drawing

function layStage() {
  const { picture } = state;
  const factor = Math.max(1, Math.floor(SMALLEST_SHOWN / Math.max(picture.width, picture.height)));
  const stage = $("stage");
  stage.style.width = fitted(picture.width * factor, picture.width, picture.height, 85);
  for (const canvas of stage.querySelectorAll("canvas")) canvas.classList.toggle("pixelated", factor > 1);
  $("original").hidden = !picture.pixels;
  if (picture.pixels) drawPixels($("original"), picture.pixels, picture.width, picture.height);
  $("decoded").style.position = picture.pixels ? "" : "static";
  $("original").setAttribute("aria-label", `The picture ${picture.name}, ${picture.width} by ${picture.height} pixels`);
  $("decoded").setAttribute("aria-label", `What the tokens of ${picture.name} decode to`);
  for (const part of [$("divider"), document.querySelector(".slider")]) part.hidden = !picture.pixels;
  const tooSmall = stage.clientWidth < SMALLEST_TAGGED[0] || stage.clientHeight < SMALLEST_TAGGED[1];
  for (const tag of stage.querySelectorAll(".tag")) tag.hidden = !picture.pixels || tooSmall;
  divide(Number($("slider").value));
}

/** A CSS width of so many pixels at the most, at which the height is at most `part` percent of the window's. */
const fitted = (pixels, width, height, part) => `min(${pixels}px, max(2px, ${(part * width) / height}vh))`;

function divide(percent) {
  $("decoded").style.clipPath = state.picture.pixels ? `inset(0 0 0 ${percent}%)` : "";
  $("divider").style.left = `${percent}%`;
}

function showNumbers() {
  const { picture, h, w, tokens, decoded, tokenizer } = state;
  const bits = tokenizer.codebooks.reduce((sum, [, size]) => sum + Math.log2(size), 0);
  const rate = (h * w * bits) / (picture.width * picture.height);
  const edited = tokens.some((id, index) => id !== state.fresh[index]);
  const shrunk = picture.fileSize && picture.fileSize[0] !== picture.width;
  const numbers = {
    Pixels: `${picture.width} × ${picture.height}` + (shrunk ? ` (of ${picture.fileSize.join(" × ")})` : ""),
    Tokens: `${tokenizer.codebooks.length} × ${h} × ${w}`,
    Bytes: tokenBytes(h, w, bits).toLocaleString("en") + (picture.bytes ? ` (file ${picture.bytes.toLocaleString("en")})` : ""),
    "Bits per pixel": rate.toFixed(4),
    "PSNR": decoded.psnr === null ? "no original" : `${decoded.psnr.toFixed(2)} dB${edited ? " (painted)" : ""}`,
    "To tokens": picture.seconds === undefined ? "from a file" : `${picture.seconds.toFixed(2)} s`,
    "From tokens": `${decoded.seconds.toFixed(2)} s`,
  };
  $("numbers").replaceChildren(...Object.entries(numbers).map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

function element(tag, text, options = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...options });
}

function makeMaps() {
  $("map-list").replaceChildren(...state.tokenizer.codebooks.map(([name], index) => {
    const figure = document.createElement("figure");
    const map = element("div", "", { className: "map", id: `map-${index}`, tabIndex: 0 });
    map.setAttribute("role", "application");
    map.setAttribute("aria-roledescription", "token map");
    map.setAttribute("aria-describedby", "map-help");
    const canvas = document.createElement("canvas");
    canvas.setAttribute("aria-hidden", "true");
    const frame = element("div", "", { className: "frame", hidden: true });
    map.append(canvas, frame);
    figure.append(map, element("figcaption", `${name} tokens`));
    listenToCells(map, canvas);
    map.addEventListener("keydown", moveByKey);
    return figure;
  }));
}

function drawMaps() {
  state.tokenizer.codebooks.forEach(([name, size], index) => {
    const map = $(`map-${index}`);
    const ids = plane(state.tokens, index);
    const bright = state.cell && state.cell.picked ? ids[cellIndex()] : null;
    drawTokens(map.querySelector("canvas"), ids, state.h, state.w, state.colours[name], bright);
    map.style.width = fitted(1000, state.w, state.h, 60);
    map.setAttribute("aria-label", `${name} tokens, ${state.w} columns and ${state.h} rows`);
    map.nextSibling.textContent = `${name}: ${new Set(ids).size} of ${size} codes`;
  });
}

// --- one cell

const cellIndex = () => state.cell.row * state.w + state.cell.column;

function selectCell(row, column, picked = false) {
  state.cell = { row, column, picked };
  drawMaps();
  for (const map of document.querySelectorAll(".map")) placeFrame(map.querySelector(".frame"), state.h, state.w);
  const { downsample_factor: factor } = state.tokenizer;
  placeFrame($("frame"), state.picture.height / factor, state.picture.width / factor);
  describeCell();
  showPatches();
}

function placeFrame(frame, rows, columns) {
  const { row, column } = state.cell;
  frame.hidden = false;
  const percent = (value, all) => `${(100 * value) / all}%`;
  Object.assign(frame.style, {
    left: percent(column, columns),
    top: percent(row, rows),
    width: percent(Math.min(1, columns - column), columns),
    height: percent(Math.min(1, rows - row), rows),
  });
}

function describeCell() {
  const { row, column } = state.cell;
  const parts = state.tokenizer.codebooks.map(([name], index) => {
    const ids = plane(state.tokens, index);
    const id = ids[cellIndex()];
    const times = ids.reduce((sum, other) => sum + (other === id), 0);
    return `${name} ${id}, ${times === 1 ? "once" : `${times} times`} in this picture`;
  });
  $("cell").hidden = false;
  $("cell-text").textContent = `Row ${row + 1} of ${state.h}, column ${column + 1} of ${state.w}: ${parts.join("; ")}.`;
}

/** The cell in the picture and in the reconstruction, and each of its codes decoded alone. */
async function showPatches() {
  const { picture, decoded, cell, tokenizer } = state;
  const { downsample_factor: factor, codebooks } = tokenizer;
  const own = codebooks.map((_, index) => plane(state.tokens, index)[cellIndex()]);
  const alone = codebooks.map(([, size], index) => codebooks.map(([, mean], other) => (other === index ? own[index] : mean)));
  const tokens = Uint16Array.from(alone.flat().flatMap((id) => Array(ALONE ** 2).fill(id)));
  const side = ALONE * factor;
  const result = await ask("decode", { tokens, batch: codebooks.length, h: ALONE, w: ALONE, height: side, width: side });
  if (state.cell !== cell) return;
  const left = cell.column * factor;
  const top = cell.row * factor;
  const size = [Math.min(factor, picture.width - left), Math.min(factor, picture.height - top)];
  const whole = { width: picture.width, left, top, size };
  const patches = picture.pixels ? [["picture", { pixels: picture.pixels, ...whole }]] : [];
  patches.push(["from tokens", { pixels: decoded.pixels, ...whole }]);
  codebooks.forEach(([name], index) => {
    const pixels = result.pixels.subarray(index * 4 * side * side, (index + 1) * 4 * side * side);
    patches.push([`${name} alone`, { pixels, width: side, left: factor, top: factor, size: [factor, factor] }]);
  });
  $("patches").replaceChildren(...patches.map(([name, cut]) => patch(name, cut)));
}

function patch(name, { pixels, width, left, top, size }) {
  const cut = new Uint8ClampedArray(4 * size[0] * size[1]);
  for (let y = 0; y < size[1]; y++) {
    const begin = 4 * ((top + y) * width + left);
    cut.set(pixels.subarray(begin, begin + 4 * size[0]), 4 * y * size[0]);
  }
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `This cell: ${name}`);
  drawPixels(canvas, cut, ...size);
  figure.append(canvas, element("figcaption", name));
  return figure;
}

// --- pointer and keys

function cellAt(event, canvas, rows, columns) {
  const box = canvas.getBoundingClientRect();
  const place = (value, all, last) => Math.min(Math.max(Math.floor(value * all), 0), last);
  return [
    place((event.clientY - box.top) / box.height, rows, state.h - 1),
    place((event.clientX - box.left) / box.width, columns, state.w - 1),
  ];
}

const isPainting = () => $("painting").checked && Boolean(brush.tokens);

function listenToCells(target, canvas) {
  const isStage = target === $("stage");
  let active = null;
  const cell = (event) => {
    const { downsample_factor: factor } = state.tokenizer;
    const grid = isStage ? [state.picture.height / factor, state.picture.width / factor] : [state.h, state.w];
    return cellAt(event, canvas, ...grid);
  };
  const move = (event) => {
    if (active === "paint") paint(...cell(event));
    else if (active === "divide") slideTo(event, canvas);
  };
  target.addEventListener("pointerdown", (event) => {
    if (event.button || !state.tokens) return;
    active = isPainting() ? "paint" : isStage && state.picture.pixels ? "divide" : "pick";
    if (active !== "pick") target.setPointerCapture(event.pointerId);
    if (active === "paint") beginStroke();
    if (active === "pick") selectCell(...cell(event), true);
    move(event);
  });
  target.addEventListener("pointermove", move);
  for (const name of ["pointerup", "pointercancel"]) {
    target.addEventListener(name, () => {
      if (active === "paint") endStroke();
      active = null;
    });
  }
}

function slideTo(event, canvas) {
  const box = canvas.getBoundingClientRect();
  $("slider").value = (100 * (event.clientX - box.left)) / box.width;
  divide(Number($("slider").value));
}

function moveByKey(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const { row, column } = state.cell;
  if (steps[event.key]) {
    const [down, right] = steps[event.key];
    const held = (value, last) => Math.min(Math.max(value, 0), last);
    selectCell(held(row + down, state.h - 1), held(column + right, state.w - 1), true);
  } else if ([" ", "Enter"].includes(event.key) && isPainting()) {
    beginStroke();
    paint(row, column);
    endStroke();
  } else return;
  event.preventDefault();
}

// --- painting

async function readBrush(blob, name) {
  Object.assign(brush, { blob, name, tokens: null });
  updateTools();
  if (!state.picture) return;
  const { width, height } = state.picture;
  const mine = generation;
  await busy(`“${name}”: picture to tokens…`, async () => {
    const picture = await readPicture(blob, name, { size: [width, height] });
    const { tokens } = await ask("encode", picture);
    if (mine !== generation) return;
    brush.tokens = tokens;
    drawPixels($("brush"), picture.pixels, width, height);
    $("brush").setAttribute("aria-label", `The picture whose tokens are painted: ${name}`);
    $("painting").checked = true;
  }, name);
  updateTools();
}

function beginStroke() {
  state.undo = [...state.undo.slice(-MOST_UNDO + 1), state.tokens.slice()];
}

function paint(row, column) {
  const reach = (Number($("brush-size").value) - 1) / 2;
  state.tokenizer.codebooks.forEach(([name], index) => {
    if ($("brush-codebook").value && $("brush-codebook").value !== name) return;
    const [mine, theirs] = [plane(state.tokens, index), plane(brush.tokens, index)];
    for (let y = Math.max(row - reach, 0); y <= Math.min(row + reach, state.h - 1); y++) {
      for (let x = Math.max(column - reach, 0); x <= Math.min(column + reach, state.w - 1); x++) {
        mine[y * state.w + x] = theirs[y * state.w + x];
      }
    }
  });
  if (state.cell) state.cell.picked = false;
  drawMaps();
}

const endStroke = () => redecode();

async function redecode() {
  updateTools();
  await busy("Tokens to picture…", decode);
  if (state.cell) selectCell(state.cell.row, state.cell.column, state.cell.picked);
}

function updateTools() {
  $("brush").hidden = !brush.tokens;
  $("painting").disabled = !brush.tokens;
  document.body.classList.toggle("painting", isPainting());
  $("undo").disabled = !state.undo.length;
  $("reset").disabled = !state.undo.length;
}

// --- files

function download(blob, name) {
  const link = element("a", "", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const stem = () => fileName(state.picture.name).replace(/\.[^.]*$/, "") || "image";

function saveTokens() {
  const file = writeTokens(state.tokenizer, { ...state.picture, tokens: state.tokens });
  download(new Blob([file], { type: "application/octet-stream" }), `${stem()}.safetensors`);
}

function savePicture() {
  $("decoded").toBlob((blob) => download(blob, `${stem()}-reconstruction.png`), "image/png");
}

// --- the start

function listen() {
  const onFile = (id, use) => {
    $(id).addEventListener("change", (event) => {
      const [file] = event.target.files;
      event.target.value = ""; // the same file may be chosen again
      if (file) use(file, file.name);
    });
  };
  onFile("picture-file", openFile);
  onFile("token-file", openTokens);
  onFile("brush-file", readBrush);
  $("max-pixels").addEventListener("change", () => {
    if (state.picture?.blob) openFile(state.picture.blob, state.picture.name);
  });
  $("slider").addEventListener("input", (event) => divide(Number(event.target.value)));
  $("error-close").addEventListener("click", () => ($("error").hidden = true));
  $("painting").addEventListener("change", updateTools);
  $("undo").addEventListener("click", () => {
    state.tokens = state.undo.pop();
    redecode();
  });
  $("reset").addEventListener("click", () => {
    Object.assign(state, { tokens: state.fresh.slice(), undo: [] });
    redecode();
  });
  $("save-tokens").addEventListener("click", saveTokens);
  $("save-picture").addEventListener("click", savePicture);
  listenToCells($("stage"), $("decoded"));
  listenToFiles();
}

/** Files that are dropped or pasted anywhere. */
function listenToFiles() {
  const body = document.body;
  body.addEventListener("dragover", (event) => {
    event.preventDefault();
    body.classList.add("dropping");
  });
  body.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) body.classList.remove("dropping");
  });
  body.addEventListener("drop", (event) => {
    event.preventDefault();
    body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) openFile(file, file.name);
    else fail("What was dropped is not a file.");
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) openFile(file, file.name || "pasted.png");
  });
}

function addExamples(names) {
  for (const [place, use] of [["examples", openFile], ["brush-examples", readBrush]]) {
    for (const name of names) {
      const button = element("button", "", { type: "button", title: name });
      button.append(Object.assign(new Image(), { src: `examples/${name}`, alt: name.replace(/\.\w+$/, "") }));
      button.addEventListener("click", async () => {
        const response = await fetch(`examples/${name}`);
        use(await response.blob(), name);
      });
      $(place).append(button);
    }
  }
}

function addChoices() {
  const { codebooks } = state.tokenizer;
  for (const [label, value] of [["all codebooks", ""], ...codebooks.map(([name]) => [`${name} alone`, name])]) {
    const input = element("input", "", { type: "radio", name: "only", value, checked: !value });
    input.addEventListener("change", () => {
      state.only = value;
      redecode();
    });
    const choice = element("label", "", { className: "inline" });
    choice.append(input, ` ${label}`);
    $("only").append(choice);
  }
  $("brush-codebook").append(new Option("all", ""), ...codebooks.map(([name]) => new Option(name, name)));
}

async function getJson(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status})`);
  return response.json();
}

async function main() {
  listen();
  const started = await busy("Loading…", async () => {
    const [tokenizer, build] = await Promise.all([getJson("onnx/tokenizer.json"), getJson("build.json")]);
    Object.assign(state, { tokenizer, colours: build.colours });
    makeMaps();
    addChoices();
    addExamples(build.examples);
    const only = new URLSearchParams(location.search).get("runtime"); // "wasm": for comparison
    const { runtime, threads, fallback } = await ask("load", { sizes: build.sizes, only });
    const place = runtime === "webgpu" ? "your GPU (WebGPU)" : `your CPU (WASM, ${threads === 1 ? "1 thread" : `${threads} threads`})`;
    $("runtime").textContent = place + (fallback ? ", because WebGPU failed" : "");
    return build;
  });
  $("progress").hidden = true;
  if (!started) return say("The tokenizer could not be loaded. Reload the page to try again.");
  document.body.dataset.ready = "true";
  if (!state.picture && started.examples.length) {
    const response = await fetch(`examples/${started.examples[0]}`);
    await openFile(await response.blob(), started.examples[0]);
  }
}

main();
