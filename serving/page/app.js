// The page: what the buttons do, and what the messages of the server mean for what is seen.

import { Connection } from "./connection.js";
import { Player, bestFormat } from "./player.js";
import { Strip, milliseconds } from "./strip.js";

const $ = (id) => document.getElementById(id);
const connection = new Connection();
const player = new Player($("screen"), $("glow"));
const strip = new Strip($("strip"));

const LABELS = { connecting: "connecting", ready: "ready", starting: "starting", queued: "in the queue", playing: "live", paused: "paused", lost: "reconnecting" };
const clip = { fps: 16, chunk_frames: 12, width: 128, height: 128, h264_codec: "", format: "jpeg" };
const asked = new Map(); // id of a control -> entry of the history
let wanted = false; // a session should run; it is begun again after a lost connection
let startedAt = 0;
let counts = { stalls: 0, dropped: 0 };
let hiddenPause = false;
let ending = "";
let recalled = -1;
let byTrack = false;
let latest = -1;

function state(name, text) {
  document.documentElement.dataset.state = name;
  $("status-text").textContent = LABELS[name];
  if (text !== undefined) $("veil-text").textContent = text;
  const live = name === "playing" || name === "paused";
  const busy = live || name === "queued" || name === "starting";
  $("go").disabled = name === "connecting" || name === "lost" || name === "queued" || name === "starting";
  $("go").textContent = live ? "Switch" : "Start";
  $("pause").disabled = !live;
  $("pause").textContent = name === "paused" ? "Resume" : "Pause";
  $("stop").disabled = !busy;
}

const current = () => document.documentElement.dataset.state;
const announce = (text) => { $("news").textContent = text; };

function readouts() {
  $("r-stalls").textContent = counts.stalls;
  $("r-dropped").textContent = counts.dropped;
}

// ---- history

function remember(id, prompt, when) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.kind = "asked";
  button.title = "Use this prompt again";
  button.append(document.createElement("i"), Object.assign(document.createElement("span"), { textContent: prompt || "(empty prompt)" }),
    Object.assign(document.createElement("span"), { className: "when", textContent: when }));
  button.onclick = () => { $("prompt").value = prompt; $("prompt").focus(); };
  const item = document.createElement("li");
  item.append(button);
  $("history").prepend(item);
  while ($("history").childElementCount > 50) $("history").lastElementChild.remove();
  const entry = { id, prompt, button, chunk: null };
  asked.set(id, entry);
  return entry;
}

function mark(entry, kind, when) {
  entry.button.dataset.kind = kind;
  if (when !== undefined) entry.button.querySelector(".when").textContent = when;
}

const prompts = () => [...$("history").querySelectorAll("span:nth-child(2)")].map((node) => node.textContent);

// ---- what the buttons do

function start() {
  const prompt = $("prompt").value.trim();
  const seed = Math.max(0, Math.floor(Number($("seed").value)) || 0);
  $("seed").value = seed;
  wanted = true;
  ending = "";
  latest = -1;
  startedAt = performance.now();
  counts = { stalls: 0, dropped: 0 };
  readouts();
  for (const id of ["r-first", "r-switch"]) $(id).textContent = "–";
  asked.clear();
  state("starting", "Waiting for the first frames.");
  player.start({ ...clip, codec: clip.h264_codec });
  strip.start(clip.chunk_frames / clip.fps);
  const id = connection.send("start", { prompt, seed, format: clip.format });
  remember(id, prompt, "first");
}

function switchPrompt() {
  const prompt = $("prompt").value.trim();
  const id = connection.send("set_prompt", { prompt, recache: $("recache").value });
  if (id === null) return;
  remember(id, prompt, "asked");
  if ($("at-once").checked && current() === "playing") connection.send("flush");
}

function pause() {
  player.pause();
  connection.send("pause");
  state("paused", "Paused");
}

function resume() {
  hiddenPause = false;
  connection.send("resume");
  player.resume();
  state("playing");
}

function stop() {
  wanted = false;
  connection.send("cancel");
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  if ($("go").disabled) return;
  recalled = -1;
  if (current() === "ready") start();
  else switchPrompt();
};
$("pause").onclick = () => (current() === "paused" ? resume() : pause());
$("stop").onclick = stop;
$("dice").onclick = () => { $("seed").value = Math.floor(Math.random() * 1e6); };
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.altKey && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
    event.preventDefault();
    const known = prompts();
    recalled = Math.min(known.length - 1, Math.max(-1, recalled + (event.key === "ArrowUp" ? 1 : -1)));
    if (recalled >= 0) $("prompt").value = known[recalled];
  }
};
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("textarea, input, button, dialog, a");
  if (event.key === " " && !typing && !$("pause").disabled) {
    event.preventDefault();
    $("pause").click();
  } else if (event.key === "Escape" && !$("stop").disabled && !$("token-dialog").open) {
    $("stop").click();
  }
});
// A hidden tab shows nothing, so nothing is made for it.
document.addEventListener("visibilitychange", () => {
  if (document.hidden && current() === "playing") {
    hiddenPause = true;
    pause();
  } else if (!document.hidden && hiddenPause && current() === "paused") resume();
});

// ---- what the server says

function on(name, act) { connection.addEventListener(name, ({ detail }) => act(detail)); }

on("token", ({ wrong }) => {
  if (wrong) $("token-text").textContent = "That token was not accepted.";
  if (!$("token-dialog").open) $("token-dialog").showModal();
});
$("token-form").onsubmit = () => {
  connection.token = $("token").value.trim();
  connection.connect();
};

on("bundle", (bundle) => {
  $("bundle").textContent = `${bundle.name} · ${bundle.width}×${bundle.height} · ${bundle.fps} fps · ${bundle.precision} · ${bundle.target}`;
  clip.chunk_frames = bundle.chunk_frames;
  const memory = $("recache");
  for (const mode of memory.options) mode.hidden = mode.disabled = !bundle.recache_modes.includes(mode.value);
  if (memory.dataset.bundle !== bundle.name) memory.value = bundle.recache;
  memory.dataset.bundle = bundle.name;
  if (!$("examples").childElementCount) {
    for (const prompt of bundle.examples) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: prompt });
      button.onclick = () => { $("prompt").value = prompt; $("composer").requestSubmit(); };
      const item = document.createElement("li");
      item.append(button);
      $("examples").append(item);
    }
    if (!$("prompt").value && bundle.examples.length) $("prompt").value = bundle.examples[0];
  }
});

on("hello", async (hello) => {
  Object.assign(clip, hello, { format: await bestFormat(hello.h264_codec) });
  state("ready", "Describe a scene and press Start.");
  if (wanted) {
    announce("Connected again; a new session begins.");
    start();
  }
});

on("queued", ({ position, seconds }) => {
  const wait = seconds === null ? "" : `, about ${Math.max(1, Math.round(seconds))} s`;
  state("queued", `All places are taken. You are number ${position} in the queue${wait}.`);
});

on("receipt", (receipt) => {
  const entry = asked.get(receipt.id);
  if (!receipt.accepted) {
    if (entry) mark(entry, "refused", "refused");
    announce(`Refused: ${receipt.error.message}`);
    if (receipt.action === "start" && receipt.error.code !== "elsewhere") {
      wanted = false;
      const again = receipt.error.retry_after ? ` Try again in ${receipt.error.retry_after} s.` : "";
      state("ready", receipt.error.message + again);
    }
    return;
  }
  if (receipt.action === "start") {
    mark(entry, "applied", "first");
    state("starting", "Waiting for the first frames.");
  } else if (receipt.action === "set_prompt") {
    for (const other of asked.values()) {
      if (other.chunk === receipt.chunk && other.button.dataset.kind === "promised") mark(other, "replaced", "replaced");
    }
    entry.chunk = receipt.chunk;
    mark(entry, "promised", `at chunk ${receipt.chunk}`);
    strip.promise(receipt.chunk, receipt.id, entry.prompt);
    announce(`The prompt changes at chunk ${receipt.chunk}, ${receipt.time.toFixed(1)} seconds into the video.`);
  } else if (receipt.action === "flush") {
    player.clear();
    strip.drop(receipt.chunk - receipt.dropped_chunks, receipt.chunk);
    counts.dropped += receipt.dropped_frames;
    readouts();
  }
});

// A track tells nothing of chunks: one is taken to be shown when the next one comes.
on("track", (stream) => {
  byTrack = true;
  player.watch(stream);
});
player.addEventListener("drawn", () => {
  if (current() !== "starting" || latest < 0) return;
  $("r-first").textContent = milliseconds((performance.now() - startedAt) / 1000);
  state("playing");
});
on("chunk", (chunk) => {
  strip.add(chunk);
  latest = chunk.chunk;
  if (!byTrack) return;
  const shown = Math.max(0, chunk.chunk - 1);
  strip.show(shown);
  $("screen").dataset.chunk = shown;
  $("clock").textContent = `${chunk.time.toFixed(1)} s`;
});
on("picture", (picture) => player.push(picture));
on("applied", ({ id, chunk, after }) => {
  strip.apply(chunk, String(id));
  const entry = asked.get(id);
  if (entry) mark(entry, "applied", `chunk ${chunk}`);
  $("r-switch").textContent = milliseconds(after);
});
on("dropped", ({ chunk, frames }) => {
  strip.drop(chunk, chunk + 1);
  counts.dropped += frames;
  readouts();
});
on("ended", ({ reason, message }) => {
  ending = reason === "cancelled" ? "Stopped. Press Start for another one." : `${message[0].toUpperCase()}${message.slice(1)}.`;
  if (reason === "completed" || reason === "cancelled" || reason === "failed") wanted = false;
  if (reason !== "completed") player.clear();
  finish();
});
on("error", ({ message }) => announce(message));
on("lost", ({ reason, wait }) => {
  player.clear();
  state("lost", `${reason} Trying again in ${Math.max(1, Math.round(wait / 1000))} s.`);
});

/** End the session once everything has been shown. */
function finish() {
  if (ending && player.empty) {
    player.pause();
    $("clock").textContent = "";
    state("ready", ending);
    ending = "";
  }
}

player.addEventListener("shown", ({ detail: picture }) => {
  if (picture.first) {
    connection.acknowledge(picture.chunk);
    strip.show(picture.chunk);
    if (picture.chunk === 0) $("r-first").textContent = milliseconds((performance.now() - startedAt) / 1000);
    if (current() === "starting") state("playing");
  }
  $("clock").textContent = `${(picture.time / 1e6).toFixed(1)} s`;
  if (picture.last) finish();
});
player.addEventListener("starved", () => {
  if (!ending) counts.stalls++;
  readouts();
});
player.addEventListener("broken", () => {
  clip.format = "jpeg"; // the next session does without
  stop();
});

state("connecting", "Connecting to the server.");
connection.connect();
