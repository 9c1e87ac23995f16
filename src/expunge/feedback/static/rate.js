// The rating page. One picture (or pair) at a time: it can be answered once it is seen, and the next one comes
// when the server has stored the answer. A request that gets no reply is sent again until it does; the server
// counts an answer, or an undo, that arrives twice once.
"use strict";

const SLOTS = {1: 0, ArrowLeft: 0, 2: 1, ArrowRight: 1, 3: 2, ArrowDown: 2};
const FIRST_WAIT = 250, LONGEST_WAIT = 4000, POLL = 1000;
const SMALL = 256; // pixels: below, single pixels shall stay sharp when enlarged
const LOST = "No reply from the server. Trying again; your answer is kept.";

const find = id => document.getElementById(id);
const sleep = time => new Promise(done => setTimeout(done, time));
const main = find("main"), stage = find("stage"), said = find("said"), problem = find("problem"), undo = find("undo");
const images = [...stage.querySelectorAll("img")];
const buttons = [...document.querySelectorAll(".choice")];

let state = null;   // what the server said last
let since = null;   // when the pictures appeared; null while nothing can be answered
let busy = false;   // a request is under way

async function send(path, body) {
  const request = body && {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
                           keepalive: true};
  for (let wait = FIRST_WAIT; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
    try {
      const reply = await fetch(main.dataset.api + path, request);
      if (reply.ok) {
        // what was refused before stays to be read
        if (problem.textContent === LOST) problem.textContent = "";
        return await reply.json();
      }
      if (reply.status < 500) {
        problem.textContent = await reply.text();
        return null;
      }
    } catch { /* no reply: below */ }
    problem.textContent = LOST;
    await sleep(wait);
  }
}

async function step(path, body, words) {
  if (busy) return;
  busy = true;
  since = null;
  problem.textContent = "";
  main.setAttribute("aria-busy", "true");
  const fresh = await send(path, body) || (path && await send("")) || state;
  busy = false;
  if (fresh) await show(fresh, words);
}

async function show(fresh, words = "") {
  state = fresh;
  const done = state.answered === state.items;
  find("count").textContent = `${state.answered} of ${state.items}`;
  find("bar").max = state.items;
  find("bar").value = state.answered;
  find("drawn").textContent = `${state.drawn} of ${state.pictures} are there. ` +
    (state.stopped ? "Drawing has stopped; whoever runs the study sees why in the terminal." : "This page goes on by itself.");
  undo.setAttribute("aria-disabled", state.last === null);
  for (const b of buttons) b.setAttribute("aria-disabled", !state.now);
  find("done").hidden = !done;
  find("waiting").hidden = done || Boolean(state.now);
  stage.hidden = !state.now;
  const news = `${words} ${state.answered} of ${state.items}.`.trim();
  if (said.textContent !== news) said.textContent = news; // what is set again is read out again
  if (state.now) await present(state.now);
  else main.setAttribute("aria-busy", "false");
  if (done) find("done-title").focus();
  else if (!state.now) setTimeout(() => step(""), POLL);
  for (const url of state.soon) new Image().src = url;
}

async function present(now) {
  stage.classList.add("loading");
  for (const veil of stage.querySelectorAll(".veil")) veil.setAttribute("aria-pressed", "false");
  now.pictures.forEach((url, i) => { images[i].src = url; });
  try {
    await Promise.all(images.map(image => image.decode()));
  } catch {
    problem.textContent = "A picture could not be loaded. Reload the page to try again.";
    return;
  }
  if (state.now !== now) return;
  stage.classList.toggle("small", images.every(image => image.naturalWidth < SMALL));
  stage.classList.remove("loading");
  // the picture is on the screen once the frame that the first callback precedes has been drawn
  requestAnimationFrame(() => requestAnimationFrame(() => {
    if (busy || state.now !== now) return;
    since = performance.now();
    main.setAttribute("aria-busy", "false");
  }));
}

function answer(slot) {
  if (since === null || busy) return;
  const body = {item: state.now.item, answer: state.now.choices[slot],
                milliseconds: Math.min(Math.round(performance.now() - since), 86400000)};
  step("/answers", body, `Stored: ${buttons[slot].querySelector("span").textContent}.`);
}

function takeBack() {
  if (state && state.last !== null) step("/undo", {item: state.last}, "Taken back.");
}

function unveil(veil) {
  veil.setAttribute("aria-pressed", veil.getAttribute("aria-pressed") !== "true");
}

for (const b of buttons) b.addEventListener("click", () => answer(Number(b.dataset.slot)));
for (const veil of stage.querySelectorAll(".veil")) veil.addEventListener("click", () => unveil(veil));
undo.addEventListener("click", takeBack);
document.addEventListener("keydown", event => {
  // a key that is held down answers once, also one that presses a button
  if (event.repeat && event.key === "Enter") event.preventDefault();
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in SLOTS) {
    event.preventDefault();
    answer(SLOTS[event.key]);
  } else if (event.key.toLowerCase() === "u") {
    takeBack();
  } else if (event.key.toLowerCase() === "v") {
    stage.querySelectorAll(".veil").forEach(unveil);
  }
});

step("");
