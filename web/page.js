// page.js: what stands on the page. The model is in worker.js; its answers come in `answers`, at the
// end of this file. A text of the page is {number, tokens, name}; each token has its id, its text,
// and means: delta, the mean of all layers, then of each layer.
'use strict';

const $ = id => document.getElementById(id);
const SERVE = 'The model could not be started. Serve the folder with a web server, for example '
  + 'python3 -m http.server: opened as files, pages may not start workers.';
const worker = startWorker();
const ask = message => worker.postMessage(message);
const settings = new URLSearchParams(location.search);  // ?auto=0: nothing is written by itself

let model = null;
let texts = [], current = null, lastNumber = 0;
let selected = -1;              // a token of the current text
let channel = 0, lookLayer = 0;
let looked = null;              // what the worker said of this token and channel
let asking = false, askAgain = false;
let busy = false;               // it reads or writes
const isTask = () => $('model').value === 'copying.bin';

// --- texts and their tokens

function addText(name) {
  const text = {number: ++lastNumber, tokens: [], name: name || `Text ${lastNumber}`, note: ''};
  texts.push(text);
  return text;
}

function show(text) {
  current = text;
  selected = -1;
  looked = null;
  $('text').replaceChildren();
  $('text').classList.toggle('task', isTask());
  if (text.note) $('text').append(Object.assign(document.createElement('i'), {textContent: text.note}));
  text.tokens.forEach((token, at) => $('text').append(tokenElement(token, at)));
  $('position').textContent = text.position || 0;
  showTabs();
  recolour();
  showLook();
}

function showTabs() {
  $('tabs').hidden = texts.length < 2;
  $('drop').hidden = texts.length < 2;
  $('tabs').replaceChildren(...texts.map(text => {
    const tab = document.createElement('button');
    tab.type = 'button';
    tab.role = 'tab';
    tab.textContent = text.name;
    tab.ariaSelected = text === current;
    tab.onclick = () => show(text);
    return tab;
  }));
}

const letter = id => id === 0 ? '·' : id === 15 ? '?' : String.fromCharCode(64 + id);

function labelOf(token) {
  if (!isTask()) return token.text.replaceAll('\n', '↵\n') || '◦';  // ◦: a part of a character
  return letter(token.want === undefined ? token.id : token.answer);
}

function tokenElement(token, at) {
  const e = document.createElement('span');
  e.className = 'tok';
  e.role = 'option';
  e.id = 't' + at;
  e.ariaSelected = false;
  e.dataset.id = token.id;
  e.textContent = labelOf(token);
  if (token.want !== undefined) {
    e.classList.add('answer');
    e.classList.toggle('wrong', token.want !== token.answer);
    e.ariaLabel = `${letter(token.answer)}, ${token.want === token.answer ? 'right' : 'wrong'}`;
  }
  return e;
}

// Colours are shares of the range of delta in this text, on a logarithmic scale. The smallest
// twentieth is all pale: one odd token must not take the colours of the others.
function scaleOf(deltas) {
  const sorted = Float32Array.from(deltas).sort();
  return sorted.length ? [sorted[Math.floor(sorted.length / 20)], sorted[sorted.length - 1]] : [0, 0];
}
function shareOf(delta, low, high) {
  return high > low ? Math.max(0, Math.log(delta / low) / Math.log(high / low)) : 0.5;
}

let recolouring = false;
function recolour() {
  if (recolouring || !current) return;
  recolouring = true;
  requestAnimationFrame(() => {
    recolouring = false;
    const row = +$('layer').value, deltas = current.tokens.map(token => token.means[row]);
    const turn = +css('--turn');  // where the letters change from dark to light
    const [low, high] = scaleOf(deltas), elements = $('text').querySelectorAll('.tok');
    elements.forEach((e, at) => {
      const share = shareOf(deltas[at], low, high), delta = deltas[at].toPrecision(7);
      e.classList.toggle('hot', share > turn);
      if (e.share !== share) e.style.setProperty('--share', share.toFixed(3));
      e.share = share;
      if (e.dataset.delta === delta) return;
      e.dataset.delta = delta;
      e.title = `Δ ${deltas[at].toPrecision(3)}, token ${current.tokens[at].id}`;
    });
    $('lowest').textContent = high ? '≤ ' + low.toPrecision(2) : '';
    $('highest').textContent = high ? high.toPrecision(2) : '';
    document.body.dataset.coloured = elements.length;
  });
}

function select(at, scroll) {
  if (!current || at < 0 || at >= current.tokens.length) return;
  const elements = $('text').querySelectorAll('.tok');
  if (elements[selected]) elements[selected].ariaSelected = false;
  selected = at;
  elements[at].ariaSelected = true;
  $('text').setAttribute('aria-activedescendant', 't' + at);
  if (scroll) elements[at].scrollIntoView({block: 'nearest'});
  look();
}

// --- one channel

function look() {
  if (selected < 0) return showLook();
  if (asking) {
    askAgain = true;
    return;
  }
  asking = true;
  $('look').ariaBusy = true;
  ask({do: 'look', text: current.number, at: selected, layer: lookLayer, channel});
}

// The numbers of token `at` in what was looked at.
function recordOf(at) {
  const N = model.N, start = (at - looked.from) * looked.size + 4;
  const part = i => looked.record.subarray(start + i * N, start + (i + 1) * N);
  const [delta, u, y, fromState] = looked.record.subarray(start - 4, start);
  return {delta, u, y, fromState, before: part(0), decay: part(1), inject: part(2), after: part(3)};
}

function showLook() {
  const on = selected >= 0 && looked && looked.record;
  for (const id of ['bars', 'strip-figure', 'map-figure', 'numbers']) $(id).hidden = !on;
  $('at-layer').value = lookLayer;
  $('at-channel').value = channel;
  if (selected < 0) $('which').textContent = 'select a token';
  if (!on) return;
  const r = recordOf(looked.at), token = current.tokens[looked.at];
  const name = isTask() ? letter(token.id) : token.text.trim() ? `“${token.text}”` : 'a space or part of a letter';
  $('which').textContent = `${name}, token ${looked.at + 1} of ${current.tokens.length}`;
  $('says').textContent = describe(r);
  const largest = Math.max(...r.before.map(Math.abs), ...r.after.map(Math.abs), ...r.inject.map(Math.abs), 1e-12);
  drawBars($('before'), r.before, largest);
  drawBars($('decay'), r.decay, 0);
  drawBars($('inject'), r.inject, largest);
  drawBars($('after'), r.after, largest);
  drawStrip();
  drawMap();
  const four = value => value.toPrecision(4);
  $('scalars').textContent = `Δ ${four(r.delta)}, u ${four(r.u)}, C·h ${four(r.fromState)}, y ${four(r.y)}. `
    + `The largest bar is ${largest.toPrecision(3)}.`;
  $('rows').replaceChildren(...Array.from(r.before, (_, n) => {
    const row = document.createElement('tr');
    for (const value of [n, r.before[n], r.decay[n], r.inject[n], r.after[n]]) {
      const small = Math.abs(value) < 1e-4 && value !== 0;
      row.insertCell().textContent = value === n ? n : small ? value.toExponential(2) : value.toPrecision(5);
    }
    return row;
  }));
}

const norm = v => Math.sqrt(v.reduce((sum, value) => sum + value * value, 0));

function describe(r) {
  const percent = value => (value > 0.99 && value < 0.9995 ? (100 * value).toFixed(1) : Math.round(100 * value)) + '%';
  const low = Math.min(...r.decay), high = Math.max(...r.decay);
  const keeps = percent(low) === percent(high) ? `keeps ${percent(high)} of what it held`
    : `keeps ${percent(low)} to ${percent(high)} of what it held`;
  const share = norm(r.inject) / (norm(r.after) || 1);
  const takes = share < 0.05 ? 'takes almost nothing from this token' : share < 0.4 ? 'takes a little from this token'
    : share < 0.8 ? 'takes much from this token' : 'is mostly this token now';
  const median = Float32Array.from(looked.deltas).sort()[looked.deltas.length >> 1];
  const than = r.delta > 2 * median ? 'larger than in most channels' : r.delta < median / 2 ? 'smaller than in most channels'
    : 'as in many channels';
  return `Δ is ${r.delta.toPrecision(3)} here, ${than} of this layer. The channel ${keeps}, and ${takes}.`;
}

// --- pictures

const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function canvas(element, height) {
  const width = element.clientWidth, scale = devicePixelRatio || 1;
  if (height) element.style.height = height + 'px';
  const h = height || element.clientHeight;
  element.width = Math.round(width * scale);
  element.height = Math.round(h * scale);
  const g = element.getContext('2d');
  g.scale(scale, scale);
  return [g, width, h];
}

// largest 0: from 0 to 1 upwards; else both ways from the middle.
function drawBars(element, values, largest) {
  const [g, width, height] = canvas(element), step = width / values.length;
  const zero = largest ? height / 2 : height, room = largest ? height / 2 - 2 : height - 2;
  values.forEach((value, n) => {
    const bar = value / (largest || 1) * room;
    g.fillStyle = value < 0 ? css('--minus') : css('--plus');
    g.fillRect(n * step + step * 0.1, zero - Math.max(bar, 0), step * 0.8, Math.abs(bar));
  });
  g.fillStyle = css('--line');
  g.fillRect(0, zero - 0.5, width, 1);
  element.role = 'img';
  element.ariaLabel = Array.from(values, value => value.toPrecision(2)).join(', ');
}

function drawStrip() {
  const [g, width, height] = canvas($('strip')), count = looked.to - looked.from, N = model.N;
  const step = width / count, row = height / N;
  let largest = 1e-12;
  for (let t = looked.from; t < looked.to; t++) for (const v of recordOf(t).after) largest = Math.max(largest, Math.abs(v));
  const plus = css('--plus'), minus = css('--minus');
  for (let t = looked.from; t < looked.to; t++) {
    recordOf(t).after.forEach((value, n) => {
      g.globalAlpha = Math.sqrt(Math.abs(value) / largest);
      g.fillStyle = value < 0 ? minus : plus;
      g.fillRect((t - looked.from) * step, n * row, step + 0.3, row + 0.3);
    });
  }
  g.globalAlpha = 1;
  g.strokeStyle = css('--ink');
  g.strokeRect((looked.at - looked.from) * step, 0.5, Math.max(step, 2), height - 1);
  $('strip').role = 'img';
  $('strip').ariaLabel = `h from token ${looked.from + 1} to ${looked.to}, largest ${largest.toPrecision(3)}`;
}

const mapColumns = () => Math.min(64, Math.ceil(Math.sqrt(model.E * 3)));

function drawMap() {
  const columns = mapColumns(), rows = Math.ceil(model.E / columns);
  const size = $('map').clientWidth / columns, [g] = canvas($('map'), Math.ceil(rows * Math.min(size, 10)));
  const height = Math.min(size, 10), hot = css('--hot'), cold = css('--cold');
  const [low, high] = scaleOf(looked.deltas);
  looked.deltas.forEach((delta, e) => {
    const left = e % columns * size, top = Math.floor(e / columns) * height;
    g.globalAlpha = 1;
    g.fillStyle = cold;
    g.fillRect(left, top, size - 0.5, height - 0.5);
    g.globalAlpha = shareOf(delta, low, high);
    g.fillStyle = hot;
    g.fillRect(left, top, size - 0.5, height - 0.5);
  });
  g.globalAlpha = 1;
  g.strokeStyle = css('--mark');
  g.lineWidth = 2;
  g.strokeRect(channel % columns * size, Math.floor(channel / columns) * height, size, height);
  $('map').role = 'img';
  $('map').ariaLabel = `Δ of ${model.E} channels`;
}

// --- what the user does

function setBusy(on) {
  busy = on;
  $('stop').disabled = !on;
  for (const id of ['go', 'new', 'fork', 'save', 'load', 'drop']) $(id).disabled = on || !model;
  for (const id of ['open', 'model']) $(id).disabled = on;
  document.body.dataset.busy = on ? 1 : 0;
}

function complain(message) {
  $('failed').textContent = message;
  $('failed').hidden = !message;
}

function seed() {
  const typed = $('seed').value;
  return typed === '' ? Math.floor(Math.random() * 2 ** 32) : Math.max(0, +typed) >>> 0;
}

function write() {
  if (!model || busy) return;
  complain('');
  setBusy(true);
  if (isTask()) {
    for (const text of texts) ask({do: 'drop', text: text.number});
    texts = [];
    show(addText('Sequence'));
    ask({do: 'copy', text: current.number, length: +$('length').value, seed: seed()});
    return;
  }
  const how = {};
  for (const id of ['temperature', 'topP', 'topK', 'minP', 'penalty']) how[id] = +$(id).value;
  ask({do: 'write', text: current.number, words: $('words').value, most: +$('most').value, seed: seed(), how});
  $('words').value = '';
  $('words').placeholder = 'More to read, or nothing: the model writes on';
}

function freshText() {
  for (const text of texts) ask({do: 'drop', text: text.number});
  texts = [];
  const text = addText();
  ask({do: 'new', text: text.number});
  show(text);
  $('words').value = isTask() ? '' : 'Once upon a time';
}

let opening = '', openName = '';  // values of the list of models
function open(message, complaint) {
  complain(complaint || '');
  setBusy(true);
  opening = message.url || '';
  $('about').textContent = 'loading…';
  ask({do: 'open', ...message});
}

function openFile(file) {
  if (!file) return;
  if (busy) return complain('Stop the writing first (Escape), then open a file.');
  if (/\.state$/.test(file.name)) loadFile(file);
  else open({file});
}

function loadFile(file) {
  if (!file || !model || busy) return;
  complain('');
  ask({do: 'load', text: ++lastNumber, file});
}

$('write').onsubmit = event => {
  event.preventDefault();
  write();
};
$('words').onkeydown = event => {
  if (event.key !== 'Enter' || event.shiftKey) return;
  event.preventDefault();
  write();
};
$('stop').onclick = () => ask({do: 'stop'});
$('new').onclick = freshText;
$('model').onchange = () => { if ($('model').value) open({url: $('model').value}); };
$('open').onclick = () => $('file').click();
$('file').onchange = () => {
  openFile($('file').files[0]);
  $('file').value = '';
};
$('load').onclick = () => $('state-file').click();
$('state-file').onchange = () => {
  loadFile($('state-file').files[0]);
  $('state-file').value = '';
};
$('save').onclick = () => ask({do: 'save', text: current.number});
$('fork').onclick = () => {
  const count = selected < 0 ? current.tokens.length : selected + 1;
  const text = addText(`Fork ${lastNumber + 1} at ${count}`);
  text.tokens = current.tokens.slice(0, count);
  text.note = current.note;
  ask({do: 'fork', from: current.number, text: text.number, count});
  show(text);
};
$('drop').onclick = () => {
  ask({do: 'drop', text: current.number});
  texts = texts.filter(text => text !== current);
  show(texts[texts.length - 1]);
};

$('text').onclick = event => {
  const token = event.target.closest('.tok');
  if (token) select(+token.id.slice(1));
};
$('text').onkeydown = event => {
  const last = current ? current.tokens.length - 1 : -1;
  const to = {ArrowLeft: selected - 1, ArrowRight: selected + 1, Home: 0, End: last}[event.key];
  const other = {ArrowUp: -1, ArrowDown: 1}[event.key];
  if (to === undefined && !other) return;
  event.preventDefault();
  if (to !== undefined) select(Math.min(Math.max(to, 0), last), true);
  else if (model) choose(lookLayer, channel + other);
};
document.addEventListener('keydown', event => {
  if (event.key === 'Escape' && busy) ask({do: 'stop'});
});

function choose(layer, to) {
  lookLayer = Math.min(Math.max(layer | 0, 0), model.layers - 1);
  channel = Math.min(Math.max(to | 0, 0), model.E - 1);
  $('at-layer').value = lookLayer;
  $('at-channel').value = channel;
  look();
}
$('at-layer').onchange = () => choose(+$('at-layer').value, channel);
$('at-channel').onchange = () => choose(lookLayer, +$('at-channel').value);
function chooseBy(better) {
  if (!looked || !looked.deltas) return;
  let best = 0;
  looked.deltas.forEach((delta, e) => { if (better(delta, looked.deltas[best])) best = e; });
  choose(lookLayer, best);
}
$('largest').onclick = () => chooseBy((a, b) => a > b);
$('smallest').onclick = () => chooseBy((a, b) => a < b);
$('map').onclick = event => {
  const columns = mapColumns(), rows = Math.ceil(model.E / columns), box = $('map').getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left) / box.width * columns);
  choose(lookLayer, Math.floor((event.clientY - box.top) / box.height * rows) * columns + column);
};
$('strip').onclick = event => {
  const box = $('strip').getBoundingClientRect();
  select(looked.from + Math.floor((event.clientX - box.left) / box.width * (looked.to - looked.from)), true);
};
$('layer').onchange = () => {
  recolour();
  const row = +$('layer').value;
  if (row > 0) choose(row - 1, channel);
};

document.querySelectorAll('input[type=range]').forEach(slider => {
  const output = slider.parentElement.querySelector('output');
  slider.oninput = () => { output.textContent = slider.value; };
  slider.oninput();
});

let drags = 0;
addEventListener('dragenter', () => { $('dropping').hidden = ++drags === 0; });
addEventListener('dragleave', () => { $('dropping').hidden = --drags <= 0; });
addEventListener('dragover', event => event.preventDefault());
addEventListener('drop', event => {
  event.preventDefault();
  drags = 0;
  $('dropping').hidden = true;
  openFile(event.dataTransfer.files[0]);
});

matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  recolour();
  showLook();
});
addEventListener('resize', () => showLook());

// --- what the worker says

const TYPES = ['float32', 'float16', 'bfloat16', '8 bits', '4 bits'];
const megabytes = n => n >= 1e6 ? (n / 1e6).toPrecision(3) + ' million' : Math.round(n / 1e3) + ' thousand';

const about = m => `${megabytes(m.parameters)} parameters in ${TYPES[m.type]}, ${m.layers} layers, `
  + `${m.E} channels of ${m.N} numbers`;

function modelOpened(message) {
  const first = model === null;
  model = message.model;
  const own = $('model').querySelector('option[value=""]');
  if (!opening) {
    own.hidden = false;
    own.textContent = message.name;
  }
  const m = model;
  $('about').textContent = about(m);
  openName = $('model').value = opening;
  $('bytes').textContent = m.stateBytes.toLocaleString('en') + ' bytes,';
  $('layer').replaceChildren(new Option('all layers, mean', 0),
    ...Array.from({length: m.layers}, (_, i) => new Option('layer ' + i, i + 1)));
  $('at-layer').max = m.layers - 1;
  $('at-channel').max = m.E - 1;
  lookLayer = Math.min(lookLayer, m.layers - 1);
  channel = Math.min(channel, m.E - 1);
  $('words-row').hidden = $('how').hidden = isTask();
  $('task-row').hidden = !isTask();
  $('go').textContent = isTask() ? 'Another sequence' : 'Write';
  texts = [];
  const text = addText();
  ask({do: 'new', text: text.number});
  setBusy(false);
  show(text);
  $('words').value = isTask() ? '' : 'Once upon a time';
  $('speed').textContent = '';
  document.body.dataset.model = message.name;
  if (settings.get('auto') !== '0' && (first || isTask())) write();
}

const answers = {
  model: modelOpened,
  tokens(message) {
    const text = texts.find(one => one.number === message.text);
    if (!text) return;
    const follows = current === text, pane = $('text');
    const atEnd = pane.scrollHeight - pane.scrollTop - pane.clientHeight < 60;
    for (const token of message.tokens) {
      text.tokens.push(token);
      if (follows) $('text').append(tokenElement(token, text.tokens.length - 1));
    }
    text.position = message.position;
    if (!follows) return;
    $('position').textContent = message.position;
    recolour();
    if (atEnd) pane.scrollTop = pane.scrollHeight;  // who reads further up is left there
  },
  done(message) {
    setBusy(false);
    const rate = (count, time) => Math.round(count / Math.max(time, 1e-6)).toLocaleString('en');
    const read = message.read ? `read ${message.read} tokens` : '';
    const wrote = message.written ? `wrote ${message.written} tokens, ${rate(message.written, message.seconds)} a second` : '';
    let right = '';
    if (message.why === 'task') {
      const marked = current.tokens.filter(token => token.want !== undefined);
      right = `, ${marked.filter(token => token.want === token.answer).length} of ${marked.length} letters are right`;
    }
    const ended = message.why === 'end of text' ? ' (the model ended the text)' : '';
    $('speed').textContent = [read, wrote].filter(Boolean).join(', ') + right + ended;
    document.body.dataset.speed = message.written / Math.max(message.seconds, 1e-6);
    if (selected < 0 && current && isTask()) select(current.tokens.findIndex(token => token.id), false);
  },
  forked(message) {
    const text = texts.find(one => one.number === message.text);
    text.position = message.position;
    if (text === current) $('position').textContent = message.position;
  },
  saved(message) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([message.bytes]));
    link.download = `mamba-${message.position}-tokens.state`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  },
  loaded(message) {
    const text = addText(`${message.name}`);
    text.number = message.text;
    lastNumber = Math.max(lastNumber, message.text);
    text.note = `[${message.name}: the state after ${message.position} tokens. The text itself is not in it.] `;
    text.position = message.position;
    show(text);
    $('words').value = '';
  },
  look(message) {
    asking = false;
    $('look').ariaBusy = false;
    if (askAgain || !message.record) {
      askAgain = false;
      if (message.record) look();
      return;
    }
    looked = message;
    showLook();
    document.body.dataset.looked = `${message.at} ${message.layer} ${message.channel}`;
  },
  failed(message) {
    complain(message.message);
    if (!message.open) model = null;  // closed for another one that could not be opened
    setBusy(false);
    if (model) $('about').textContent = about(model);
    if (model) $('model').value = openName;
    else if (opening !== 'story.bin') open({url: 'story.bin'}, message.message);
  },
};
if (worker) worker.onmessage = event => answers[event.data.is](event.data);
if (worker) worker.onerror = event => complain(event.message ? 'worker.js: ' + event.message : SERVE);

function startWorker() {
  try {
    return new Worker('worker.js');
  } catch (error) {
    return null;
  }
}

setBusy(true);
if (worker) open({url: $('model').value});
else complain(SERVE);
