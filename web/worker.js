// worker.js: the model and its texts, beside the page. The page sends {do: ...}, and gets
// {is: ...}; both are listed at the end. mamba.wasm is mamba.c with the verbs of mamba_web.c.
'use strict';

let x;                  // the exports of mamba.wasm
let model = null;       // its numbers, see MODEL_NUMBERS
let texts = new Map();  // by the page's number of a text
let scratch = 0;        // a state to look at earlier tokens with
let room = {};          // arrays in the module's memory
let writing = null;     // the text that is being written: {text, left, how, ...}

const MODEL_NUMBERS = ['layers', 'D', 'E', 'N', 'K', 'R', 'V', 'parameters', 'type', 'stateBytes',
                       'start'];
const CHUNK = 64;          // tokens read at a time
const WINDOW = 96;         // tokens of the picture of one channel
const RECORD = 4;          // as in mamba_web.c
const SNAP_BYTES = 48e6;   // of the states that a text keeps to look back with
const COPY_TOKENS = 16, NOISE = 0, MARKER = 15;  // the task, as in cli/tasks.h

// --- the module's memory. Views are made anew each time: the memory may have grown and moved.

const bytesAt = (at, n) => new Uint8Array(x.memory.buffer, at, n);
const intsAt = (at, n) => new Int32Array(x.memory.buffer, at, n);
const floatsAt = (at, n) => new Float32Array(x.memory.buffer, at, n);

function errorText() {
  const at = x.web_error(), all = new Uint8Array(x.memory.buffer, at);
  return new TextDecoder().decode(all.slice(0, all.indexOf(0)));
}
function must(good) {
  if (!good) throw new Error(errorText());
  return good;
}

async function start() {
  const nothing = () => 0;
  const imports = {
    env: {emscripten_notify_memory_growth: nothing},
    wasi_snapshot_preview1: {
      proc_exit: code => { throw new Error('the program ended with ' + code); },
      fd_close: nothing, fd_seek: nothing, fd_write: nothing, fd_read: nothing,
    },
  };
  const bytes = await (await get('mamba.wasm')).arrayBuffer();
  x = (await WebAssembly.instantiate(bytes, imports)).instance.exports;
  x._initialize();
}

async function get(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: the server answers ${answer.status}`);
  return answer;
}

// --- models

// A model.bin from the server or from the user's disk, piece by piece into the module's memory.
async function openModel(url, file) {
  if (!x) await start();
  if (file) {  // what is open stays open if this cannot be a model
    const magic = new TextDecoder().decode(await file.slice(0, 8).arrayBuffer());
    if (magic !== 'mamba.c\n') throw new Error(`${file.name} is not a model.bin`);
    if (file.size > 3.9e9) throw new Error(`${file.name}: a page can use up to 4 GB`);
  }
  const bytes = file ? file.size : 0;
  closeModel();
  const whole = file ? null : await (await get(url)).arrayBuffer();
  const size = file ? bytes : whole.byteLength, at = must(x.web_alloc(size));
  if (whole) bytesAt(at, size).set(new Uint8Array(whole));
  for (let from = 0; file && from < size; from += 1 << 24) {
    const part = await file.slice(from, Math.min(size, from + (1 << 24))).arrayBuffer();
    bytesAt(at + from, part.byteLength).set(new Uint8Array(part));
  }
  must(x.web_open(at, size) === 0);
  model = {};
  MODEL_NUMBERS.forEach((name, i) => { model[name] = x.web_number(i); });
  const rows = model.layers + 1, record = RECORD + 4 * model.N;
  room.ids = must(x.web_alloc(4 * WINDOW));
  room.means = must(x.web_alloc(4 * rows * WINDOW));
  room.record = must(x.web_alloc(4 * WINDOW * record));
  room.deltas = must(x.web_alloc(4 * model.E));
  room.count = must(x.web_alloc(4));
  scratch = must(x.web_state_new());
  postMessage({is: 'model', model, name: file ? file.name : url});
}

function closeModel() {
  writing = null;
  for (const text of texts.values()) dropText(text);
  texts.clear();
  for (const at of Object.values(room)) x.web_free(at);
  room = {};
  if (scratch) x.web_state_free(scratch);
  scratch = 0;
  if (model) x.web_close();
  model = null;
}

// --- texts. A text is a state and the ids that it has read. Now and then a copy of the state is
// kept (a snap), so that an earlier token can be looked at: from the snap before it, a few tokens
// are read again. Forks share their snaps.

function newText(number) {
  if (texts.has(number)) dropText(texts.get(number));
  const text = {number, state: must(x.web_state_new()), ids: [], snaps: [], every: CHUNK,
                decoder: new TextDecoder()};
  texts.set(number, text);
  snap(text);
  return text;
}

function dropText(text) {
  if (writing && writing.text === text) writing = null;
  x.web_state_free(text.state);
  text.snaps.forEach(dropSnap);
  texts.delete(text.number);
}

function dropSnap(kept) {
  if (--kept.copy.uses === 0) x.web_state_free(kept.copy.state);
}

function snap(text) {
  const state = must(x.web_state_new());
  x.web_state_copy(state, text.state);
  text.snaps.push({at: text.ids.length, copy: {state, uses: 1}});
  const most = Math.max(4, Math.min(64, Math.floor(SNAP_BYTES / model.stateBytes)));
  if (text.snaps.length <= most) return;
  text.every *= 2;
  text.snaps = text.snaps.filter(kept => {
    if (kept.at % text.every === 0) return true;
    dropSnap(kept);
    return false;
  });
}

// Reads up to CHUNK ids; their delta: of each token the mean of all layers, then of each layer.
function readIds(state, ids) {
  const n = ids.length, rows = model.layers + 1;
  intsAt(room.ids, n).set(ids);
  must(x.web_read(state, room.ids, n, room.means) === 0);
  const means = floatsAt(room.means, rows * n);
  return ids.map((_, t) => Float32Array.from({length: rows}, (_, row) => means[row * n + t]));
}

// Whole characters: where a model's tokens are bytes, the decoder waits for the rest of one.
function decode(text, id) {
  const n = x.web_decode(text.state, id);
  return text.decoder.decode(bytesAt(x.web_text(), n), {stream: true});
}

// The text reads ids, and the page is told.
function feed(text, ids) {
  for (let done = 0; done < ids.length;) {
    const n = Math.min(ids.length - done, text.every - text.ids.length % text.every, CHUNK);
    const part = ids.slice(done, done + n);
    const words = part.map(id => decode(text, id));
    const means = readIds(text.state, part);
    text.ids.push(...part);
    if (text.ids.length % text.every === 0) snap(text);
    const tokens = part.map((id, t) => ({id, text: words[t], means: means[t]}));
    postMessage({is: 'tokens', text: text.number, tokens, position: position(text)});
    done += n;
  }
}
const position = text => x.web_state_position(text.state);

function encode(words) {
  const bytes = new TextEncoder().encode(words), at = must(x.web_alloc(bytes.length + 1));
  bytesAt(at, bytes.length).set(bytes);
  const ids = x.web_encode(at, bytes.length, room.count);
  x.web_free(at);
  const list = Array.from(intsAt(must(ids), intsAt(room.count, 1)[0]));
  x.web_release(ids);
  return list;
}

// --- writing

function beginWriting(message) {
  const text = texts.get(message.text);
  let ids = message.words ? encode(message.words) : [];
  if (ids.length === 0 && position(text) === 0 && model.start >= 0) ids = [model.start];
  writing = {text, ids, at: 0, seed: message.seed, left: message.most, how: message.how,
             written: 0, seconds: 0};
  writeSome();
}

// Reads what is left to read, then writes, for some 40 ms. Then what the page has sent in the
// meantime comes first.
function writeSome() {
  const w = writing, began = performance.now();
  if (!w) return;
  try {
    if (w.at < w.ids.length) {
      feed(w.text, w.ids.slice(w.at, w.at += CHUNK));
      if (w.at >= w.ids.length) x.web_state_seed(w.text.state, w.seed);
      later.port2.postMessage(0);
      return;
    }
    if (!w.ids.length && !w.written) x.web_state_seed(w.text.state, w.seed);
    let ended = w.left <= 0 ? 'length' : '';
    while (!ended && performance.now() - began < 40) {
      const {temperature, topP, topK, minP, penalty} = w.how;
      const id = x.web_sample(w.text.state, temperature, topP, topK, minP, penalty);
      must(id >= 0);
      if (x.web_is_end(id)) ended = 'end of text';
      else {
        feed(w.text, [id]);
        w.written++;
        if (--w.left <= 0) ended = 'length';
      }
    }
    w.seconds += (performance.now() - began) / 1000;
    if (!ended) {
      later.port2.postMessage(0);
      return;
    }
    endWriting(ended);
  } catch (error) {
    writing = null;
    tellError(error);
  }
}
const later = new MessageChannel();
later.port1.onmessage = writeSome;

function endWriting(why) {
  const w = writing;
  writing = null;
  if (w) postMessage({is: 'done', text: w.text.number, why, written: w.written, seconds: w.seconds,
                      read: Math.min(w.at, w.ids.length)});
}

// --- selective copying: letters among noise, then markers, where the letters must come back

function randomFrom(seed) {  // mulberry32
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function copyTask(message) {
  const text = newText(message.text), random = randomFrom(message.seed);
  const body = message.length - COPY_TOKENS, ids = [], wanted = [];
  for (let t = 0; t < body; t++) {  // all sets of places are equally likely
    const letter = random() * (body - t) < COPY_TOKENS - wanted.length;
    const id = letter ? 1 + Math.floor(random() * 14) : NOISE;
    if (letter) wanted.push(id);
    ids.push(id);
  }
  feed(text, ids);
  for (const want of wanted) {
    const means = readIds(text.state, [MARKER])[0];
    text.ids.push(MARKER);
    if (text.ids.length % text.every === 0) snap(text);
    const token = {id: MARKER, text: '', means, want, answer: x.web_likeliest(text.state)};
    postMessage({is: 'tokens', text: text.number, tokens: [token], position: position(text)});
  }
  postMessage({is: 'done', text: text.number, why: 'task', written: 0, seconds: 0,
               read: message.length});
}

// --- states

// state becomes what text was after `count` tokens.
function goBack(text, count, state) {
  const from = text.snaps.filter(kept => kept.at <= count).pop();
  x.web_state_copy(state, from.copy.state);
  for (let at = from.at; at < count;) {
    const part = text.ids.slice(at, Math.min(count, at + CHUNK));
    part.forEach(id => x.web_decode(state, id));
    readIds(state, part);
    at += part.length;
  }
}

function fork(message) {
  const from = texts.get(message.from), count = message.count;
  const text = {number: message.text, state: must(x.web_state_new()),
                ids: from.ids.slice(0, count), every: from.every, decoder: new TextDecoder(),
                snaps: from.snaps.filter(kept => kept.at <= count)};
  text.snaps = text.snaps.map(kept => {
    kept.copy.uses++;
    return {...kept};
  });
  texts.set(text.number, text);
  goBack(from, count, text.state);
  postMessage({is: 'forked', text: text.number, position: position(text)});
}

function saveState(message) {
  const text = texts.get(message.text), at = must(x.web_alloc(model.stateBytes));
  must(x.web_state_write(text.state, at) === 0);
  const bytes = bytesAt(at, model.stateBytes).slice().buffer;
  x.web_free(at);
  postMessage({is: 'saved', bytes, position: position(text)}, [bytes]);
}

async function loadState(message) {
  const bytes = new Uint8Array(await message.file.arrayBuffer());
  const at = must(x.web_alloc(bytes.length));
  bytesAt(at, bytes.length).set(bytes);
  const bad = x.web_state_read(scratch, at, bytes.length);
  x.web_free(at);
  if (bad) throw new Error(errorText().replace('the state in memory', message.file.name));
  const text = newText(message.text);
  x.web_state_copy(text.state, scratch);
  dropSnap(text.snaps.pop());
  snap(text);
  postMessage({is: 'loaded', text: text.number, position: position(text),
               name: message.file.name});
}

// --- looking: one channel of one layer, around one token

function look(message) {
  const text = texts.get(message.text), at = message.at, size = RECORD + 4 * model.N;
  if (!text || at >= text.ids.length) return;
  const from = Math.max(0, at - WINDOW * 2 / 3), to = Math.min(text.ids.length, from + WINDOW);
  const record = new Float32Array((to - from) * size);
  let deltas;
  goBack(text, from, scratch);
  const steps = at + 1 < to ? [[from, at + 1], [at + 1, to]] : [[from, to]];
  for (const [first, end] of steps) {
    intsAt(room.ids, end - first).set(text.ids.slice(first, end));
    must(x.web_channel(scratch, room.ids, end - first, message.layer, message.channel,
                       room.record, room.deltas) === 0);
    record.set(floatsAt(room.record, (end - first) * size), (first - from) * size);
    if (end === at + 1) deltas = floatsAt(room.deltas, model.E).slice();
  }
  postMessage({is: 'look', ...message, from, to, size, record, deltas});
}

// --- what the page may ask for. The answers: model, tokens, done, forked, saved, loaded, look, and
// failed with a sentence.

const verbs = {
  open: message => openModel(message.url, message.file),
  new: message => { newText(message.text); },
  write: beginWriting,
  stop: () => endWriting('stop'),
  copy: copyTask,
  fork,
  drop: message => dropText(texts.get(message.text)),
  save: saveState,
  load: loadState,
  look,
};

function tellError(error) {
  const text = error instanceof RangeError ? 'out of memory: ' + error.message : error.message;
  postMessage({is: 'failed', message: text, open: model !== null});
}

let queue = Promise.resolve();  // one at a time: opening a model takes a while
onmessage = event => {
  queue = queue.then(() => verbs[event.data.do](event.data)).catch(error => {
    tellError(error);
    if (event.data.do === 'look') postMessage({is: 'look', ...event.data, record: null});
  });
};
