// The page: asks for the models, draws the same prompt and seed with each in turn, and shows what each took.
"use strict";

const $ = (id) => document.getElementById(id);
const form = $("form");
const NUMBERS = ["seed", "steps", "guidance", "width", "height"];
const RETRY = 1000; // milliseconds between questions while a model starts
let models = [];
let drawing = null; // the AbortController of what is being drawn

class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value.trim()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw new ApiError(response.status, await words(response));
  return response;
}

async function words(response) {
  const body = await response.json().catch(() => null);
  const message = sentence(body?.error?.message ?? `the server answered ${response.status}`);
  const wait = response.headers.get("Retry-After");
  return wait ? `${message} Try again in ${wait} s.` : message;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// Models

async function loadModels() {
  try {
    models = (await (await ask("v1/models")).json()).data;
  } catch (error) {
    $("models").textContent = "";
    if (error.status === 401) {
      const tried = $("key").value !== "";
      $("key-field").hidden = false;
      $("draw").disabled = false;
      $("key").focus();
      say(tried ? "The server does not know this API key." : "This server wants an API key.", tried);
    } else {
      say(error.message, true);
      setTimeout(loadModels, 3 * RETRY);
    }
    return false;
  }
  const ready = models.every((model) => model.ready);
  $("models").textContent = models.map((model) => model.id + (model.ready ? "" : " (starting)")).join(" · ");
  describe();
  $("draw").disabled = !ready;
  say(ready ? "" : "The models are being warmed up …");
  if (!ready) setTimeout(loadModels, RETRY);
  else if (new URLSearchParams(location.search).has("draw")) draw();
  return ready;
}

function describe() {
  const [first] = models;
  const [width, height] = (first.size ?? "x").split("x");
  const own = { steps: first.num_inference_steps, guidance: first.guidance_scale, width, height };
  for (const [name, value] of Object.entries(own)) $(name).placeholder = value ?? "";
  const hints = ["width", "height"].map(limitSide);
  $("sizes").textContent = hints[0] === hints[1] ? hints[0] && `Sides: ${hints[0]}` : `Width: ${hints[0]}; height: ${hints[1]}`;
}

// What all models can draw: the range that their ranges share.
function limitSide(axis) {
  const sides = models.map((model) => model.sizes?.[axis]);
  const input = $(axis);
  input.disabled = sides.some((side) => !side);
  if (input.disabled) {
    input.value = "";
    return "";
  }
  const min = Math.max(...sides.map((side) => side.min));
  const max = Math.min(...sides.map((side) => side.max));
  const step = Math.max(...sides.map((side) => side.step));
  Object.assign(input, { min, max, step });
  return min === max ? `${min} pixels` : `${min} to ${max} pixels in steps of ${step}`;
}

// Drawing

function fields(model) {
  const body = { model: model.id, prompt: $("prompt").value.trim(), seed: Number($("seed").value), n: 1, stream: true };
  if ($("steps").value) body.num_inference_steps = Number($("steps").value);
  if ($("guidance").value) body.guidance_scale = Number($("guidance").value);
  if ($("width").value || $("height").value) {
    const [width, height] = model.size.split("x");
    body.size = `${$("width").value || width}x${$("height").value || height}`;
  }
  if ($("previews").checked) body.partial_images = 8;
  return body;
}

function valid() {
  const inputs = [...form.querySelectorAll("input, textarea")];
  for (const input of inputs) input.setAttribute("aria-invalid", String(!input.checkValidity()));
  const wrong = inputs.find((input) => !input.checkValidity());
  if (!$("prompt").value.trim()) {
    $("prompt").setAttribute("aria-invalid", "true");
    $("prompt").focus();
    say("Say what to draw.", true);
    return false;
  }
  if (wrong) {
    wrong.focus();
    say(`${form.querySelector(`label[for="${wrong.id}"]`).textContent}: ${wrong.validationMessage}`, true);
  }
  return !wrong;
}

async function draw() {
  if (drawing) return;
  if (!models.length && (!(await loadModels()) || drawing)) return;
  if (!valid()) return;
  const controller = new AbortController();
  drawing = controller;
  $("cancel").disabled = false;
  $("draw").disabled = true;
  remember();
  const cards = models.map(addCard);
  $("pictures").replaceChildren(...cards.map((card) => card.root));
  const done = [];
  try {
    for (const [index, model] of models.entries()) { // in turn: at once, each would slow the other
      say(`Drawing with ${model.id} …`);
      const seconds = await drawOne(model, cards[index], controller.signal);
      done.push({ name: model.id, seconds });
    }
    say(compare(done, cards));
  } catch (error) {
    const stopped = error.name === "AbortError";
    const why = stopped ? "Cancelled." : error instanceof ApiError ? error.message : `The connection broke: ${error.message}.`;
    const card = cards[done.length];
    card.note.textContent = why;
    card.note.classList.toggle("bad", !stopped);
    card.progress.hidden = true;
    for (const later of cards.slice(done.length + 1)) later.progress.hidden = true;
    say(why, !stopped);
    if (error.status === 401) $("key-field").hidden = false;
  } finally {
    drawing = null;
    $("cancel").disabled = true;
    $("draw").disabled = false;
  }
}

function addCard(model) {
  const root = $("card").content.firstElementChild.cloneNode(true);
  const find = (name) => root.querySelector(name);
  find(".name").textContent = model.id;
  find("progress").setAttribute("aria-label", `Progress of ${model.id}`);
  return { root, image: find("img"), latency: find(".latency"), progress: find("progress"), note: find(".note"), save: find(".save") };
}

// Draws with one model; the seconds that it took, without those in the queue.
async function drawOne(model, card, signal) {
  const body = fields(model);
  const headers = { "Content-Type": "application/json" };
  const response = await ask("v1/images/generations", { method: "POST", headers, body: JSON.stringify(body), signal });
  for await (const { event, data } of events(response)) {
    if (event === "error") throw new ApiError(0, sentence(data.error.message));
    if (data.total) {
      card.progress.value = data.step / data.total;
      card.note.textContent = `Step ${data.step} of ${data.total}`;
    }
    if (data.b64_json) show(card, data, body.prompt, event !== "image_generation.completed");
    if (event === "image_generation.completed") return finish(model, card, data);
  }
  throw new ApiError(0, "The server ended the stream before the picture came.");
}

function show(card, data, prompt, partial) {
  card.image.src = `data:image/png;base64,${data.b64_json}`;
  card.image.alt = prompt;
  card.image.hidden = false;
  card.image.classList.toggle("partial", partial);
  card.image.classList.toggle("small", parseInt(data.size, 10) < 256);
}

function finish(model, card, data) {
  const seconds = data.timing.total - data.timing.wait;
  const waited = data.timing.wait >= 0.1 ? `, waited ${time(data.timing.wait)}` : "";
  card.progress.hidden = true;
  card.latency.textContent = time(seconds);
  card.note.textContent = `${data.size.replace("x", " × ")}, seed ${data.seed}${waited}`;
  card.save.href = card.image.src;
  card.save.download = `${model.id}-${data.seed}.png`;
  card.save.hidden = false;
  return seconds;
}

const time = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`);

// Each model against the first one.
function compare(done, cards) {
  const [first, ...others] = done;
  const ratios = others.map(({ name, seconds }, index) => {
    const ratio = (first.seconds / seconds).toFixed(2);
    cards[index + 1].latency.textContent += ` · ${ratio}×`;
    return `${name} ${ratio}× as fast as ${first.name}`;
  });
  return ratios.length ? `Drawn: ${ratios.join(", ")} this time; obsdiff bench measures it.` : `Drawn in ${time(first.seconds)}.`;
}

// Server-sent events of a response.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const lines = Object.fromEntries(part.split("\n").map((line) => [line.split(": ", 1)[0], line.slice(line.indexOf(": ") + 2)]));
      if (lines.data) yield { event: lines.event, data: JSON.parse(lines.data) };
    }
  }
}

// The address keeps what was drawn, to share or to reload.
function remember() {
  const query = new URLSearchParams({ prompt: $("prompt").value.trim() });
  for (const name of NUMBERS) if ($(name).value) query.set(name, $(name).value);
  history.replaceState(null, "", `?${query}`);
}

function recall() {
  const query = new URLSearchParams(location.search);
  for (const name of ["prompt", ...NUMBERS]) if (query.has(name)) $(name).value = query.get(name);
  $("previews").checked = query.has("previews");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
$("key").addEventListener("change", () => (models = []));
$("another").addEventListener("click", () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
});
$("cancel").addEventListener("click", () => drawing?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") drawing?.abort();
});

recall();
loadModels();
