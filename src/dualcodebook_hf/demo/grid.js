// A grid of tokens over a picture. Arrow keys and the pointer move one cursor over all grids that look up; where
// squares are painted, dragging and the space bar do it. Gradio gives `element`, `props`, `trigger` and `watch`.
// What was chosen is the component's value, "row column" or runs of squares: of an event that waits for another one
// to end, Gradio takes the value when it begins, but the data that came with the first of those that waited.
const grid = () => element.querySelector('.grid');
const number = (node, name) => Number(node.dataset[name]);
const paints = (node) => 'region' in node.dataset;
let drawing = null; // what the pointer that is down does: 1 paints, 0 wipes
let later = 0;

function prepare() {
  const node = grid();
  if (!node) return;
  node.cells = new Uint8Array(number(node, 'rows') * number(node, 'columns'));
  for (const run of (node.dataset.region || '').split(' ').filter(Boolean)) {
    const [start, length] = run.split('+').map(Number);
    node.cells.fill(1, start, start + length);
  }
  place(node);
  reveal(node);
  draw(node);
}

function runs(node) {
  const found = [];
  for (let at = 0; at < node.cells.length; at++) {
    if (!node.cells[at]) continue;
    const start = at;
    while (at < node.cells.length && node.cells[at]) at++;
    found.push([start, at - start]);
  }
  return found;
}

function draw(node) {
  if (!paints(node)) return;
  const columns = number(node, 'columns');
  let path = '';
  node.cells.forEach((cell, at) => {
    if (cell) path += `M${at % columns} ${Math.floor(at / columns)}h1v1h-1z`;
  });
  node.querySelector('path').setAttribute('d', path);
}

// The cursor of a node at its row and column; squares at the right and bottom edge may be cut.
function place(node) {
  const factor = number(node, 'factor');
  const [width, height] = [number(node, 'width') / factor, number(node, 'height') / factor];
  const [row, column] = [number(node, 'row'), number(node, 'column')];
  Object.assign(node.querySelector('.cursor').style, {
    left: `${(100 * column) / width}%`,
    top: `${(100 * row) / height}%`,
    width: `${(100 * Math.min(1, width - column)) / width}%`,
    height: `${(100 * Math.min(1, height - row)) / height}%`,
  });
}

function move(node, row, column) {
  row = Math.min(Math.max(row, 0), number(node, 'rows') - 1);
  column = Math.min(Math.max(column, 0), number(node, 'columns') - 1);
  for (const other of paints(node) ? [node] : document.querySelectorAll('.grid:not([data-region])')) {
    if (other.dataset.rows !== node.dataset.rows || other.dataset.columns !== node.dataset.columns) continue;
    other.dataset.row = row;
    other.dataset.column = column;
    place(other);
  }
  reveal(node);
}

// Scrolls a long picture, and not the page.
function reveal(node) {
  const [cursor, sheet] = [node.querySelector('.cursor'), node.parentElement];
  for (const [at, size, scroll, view] of [
    [cursor.offsetLeft, cursor.offsetWidth, 'scrollLeft', sheet.clientWidth],
    [cursor.offsetTop, cursor.offsetHeight, 'scrollTop', sheet.clientHeight],
  ])
    if (at < sheet[scroll] || at + size > sheet[scroll] + view) sheet[scroll] = at - view / 2;
}

function say(node, text) {
  element.querySelector('.said').textContent = text;
}

function describe(node) {
  const [row, column] = [number(node, 'row'), number(node, 'column')];
  const painted = node.cells[row * number(node, 'columns') + column] ? ', painted' : '';
  say(node, `Row ${row + 1}, column ${column + 1}${paints(node) ? painted || ', not painted' : ''}`);
}

function choose(value, wait) {
  props.value = value;
  clearTimeout(later);
  later = setTimeout(() => trigger('select'), wait);
}

function lookUp(node) {
  choose(`${number(node, 'row')} ${number(node, 'column')}`, 150);
}

function paint(node, value) {
  const reach = (Number(element.querySelector('.brush').value) - 1) / 2;
  const [rows, columns, row, column] = ['rows', 'columns', 'row', 'column'].map((name) => number(node, name));
  for (let y = Math.max(0, row - reach); y <= Math.min(rows - 1, row + reach); y++)
    node.cells.fill(value, y * columns + Math.max(0, column - reach), y * columns + Math.min(columns - 1, column + reach) + 1);
  draw(node);
}

function send(node) {
  choose(runs(node).map((run) => run.join('+')).join(' '), 250);
}

function isPainted(node) {
  return node.cells[number(node, 'row') * number(node, 'columns') + number(node, 'column')];
}

function follow(node, event) {
  const box = node.getBoundingClientRect();
  const factor = number(node, 'factor');
  const row = ((event.clientY - box.top) / box.height) * (number(node, 'height') / factor);
  const column = ((event.clientX - box.left) / box.width) * (number(node, 'width') / factor);
  move(node, Math.floor(row), Math.floor(column));
}

element.addEventListener('pointerdown', (event) => {
  const node = event.target.closest('.grid');
  if (!node || event.button) return;
  follow(node, event);
  if (!paints(node)) return lookUp(node);
  node.setPointerCapture(event.pointerId);
  drawing = isPainted(node) ? 0 : 1;
  paint(node, drawing);
});

element.addEventListener('pointermove', (event) => {
  const node = event.target.closest('.grid');
  if (!node || drawing === null) return;
  follow(node, event);
  paint(node, drawing);
});

for (const name of ['pointerup', 'pointercancel'])
  element.addEventListener(name, () => {
    if (drawing !== null) send(grid());
    drawing = null;
  });

element.addEventListener('keydown', (event) => {
  const node = event.target.closest('.grid');
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!node || event.ctrlKey || event.altKey || event.metaKey) return;
  if (step) {
    move(node, number(node, 'row') + step[0], number(node, 'column') + step[1]);
    if (paints(node) && event.shiftKey) paint(node, 1);
  } else if (event.key !== ' ' && event.key !== 'Enter') return;
  else if (paints(node)) paint(node, isPainted(node) ? 0 : 1);
  event.preventDefault();
  describe(node);
  if (!paints(node)) lookUp(node);
  else if (!step || event.shiftKey) send(node);
});

element.addEventListener('click', (event) => {
  const fill = event.target.closest('[data-fill]');
  if (!fill) return;
  const node = grid();
  node.cells.fill(Number(fill.dataset.fill));
  draw(node);
  say(node, fill.textContent);
  send(node);
});

watch('picture', prepare);
prepare();
