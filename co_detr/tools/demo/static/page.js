// The page: takes an image, asks the server for its boxes once, and leaves the rest to `BoxView`.

import { BoxView } from "./boxes.js";
import { saveJson, savePicture } from "./save.js";

const settings = JSON.parse(document.getElementById("settings").textContent);
const get = (id) => document.getElementById(id);
const view = new BoxView(settings.classes);

let shown = null; // { file, coco } of the boxes on the page
let request = new AbortController(); // of the newest image; those before are given up

async function show(file) {
  request.abort();
  request = new AbortController();
  const { signal } = request;
  clear();
  if (file.size > settings.megabytes * 2 ** 20) {
    fail(`${file.name} is larger than ${settings.megabytes} MB: make it smaller.`);
    return;
  }
  const size = await showPicture(URL.createObjectURL(file));
  if (signal.aborted) return;
  const stopClock = startClock();
  try {
    const found = await detect(file, size, signal);
    if (found.picture) await showPicture(found.picture);
    if (signal.aborted) return;
    shown = { file, coco: found.coco };
    view.show(found.coco, found.seconds);
    get("panel").hidden = false;
    view.filter(threshold());
  } catch (error) {
    if (!signal.aborted) fail(error.message);
  } finally {
    if (!signal.aborted) stopClock();
  }
}

// Returns the size in which the browser shows the picture, or null if it cannot.
async function showPicture(url) {
  const picture = get("picture");
  if (picture.src.startsWith("blob:")) URL.revokeObjectURL(picture.src);
  picture.src = url;
  get("stage").hidden = false;
  get("drop").classList.add("small");
  try {
    await picture.decode();
    const size = { width: picture.naturalWidth, height: picture.naturalHeight };
    get("stage").style.setProperty("--width", size.width);
    get("stage").style.setProperty("--height", size.height);
    return size;
  } catch {
    return null; // a format of which only the server can make a picture, or no image at all
  }
}

async function detect(file, size, signal) {
  const query = new URLSearchParams({ name: file.name, ...size });
  let response;
  try {
    response = await fetch(`detect?${query}`, {
      method: "POST",
      headers: { "Content-Type": settings.uploadType },
      body: file,
      signal,
    });
  } catch (error) {
    throw new Error("The server cannot be reached: look whether demo.py still runs.", { cause: error });
  }
  const isJson = response.headers.get("Content-Type")?.startsWith("application/json");
  const content = isJson ? await response.json() : {};
  if (!response.ok) throw new Error(content.error ?? `The server answered ${response.status}.`);
  return content;
}

function clear() {
  shown = null;
  view.clear();
  get("busy").hidden = true;
  get("error").hidden = true;
  get("panel").hidden = true;
}

function fail(message) {
  clear();
  get("stage").hidden = true;
  get("drop").classList.remove("small");
  get("error").textContent = message;
  get("error").hidden = false;
}

// Shows how long it has been going on; returns what ends it.
function startClock() {
  const start = performance.now();
  const tick = () => {
    const seconds = Math.floor((performance.now() - start) / 1000);
    get("elapsed").textContent = `Looking for objects… ${seconds ? `${seconds} s` : ""}`;
  };
  tick();
  clearInterval(startClock.timer);
  startClock.timer = setInterval(tick, 1000);
  get("busy").hidden = false;
  return () => {
    clearInterval(startClock.timer);
    get("busy").hidden = true;
  };
}

const threshold = () => get("score").valueAsNumber;

function takeFirst(files) {
  const file = files[0];
  if (file) show(file);
  else fail("That is no file: drop or paste an image file.");
}

get("masks-shown").addEventListener("change", (event) => view.showMasks(event.target.checked));
get("score").addEventListener("input", () => view.filter(threshold()));

get("file").addEventListener("change", (event) => {
  const { files } = event.target;
  if (files.length) takeFirst([...files]);
  event.target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) takeFirst(event.clipboardData.files);
});

// Anywhere on the page, so that nobody leaves it by missing the frame.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  takeFirst(event.dataTransfer.files);
});

get("save-picture").addEventListener("click", async () => {
  try {
    const masked = get("masks-shown").checked;
    await savePicture(get("picture"), view.visible(), settings.classes, shown.file.name, masked);
  } catch (error) {
    get("error").textContent = error.message;
    get("error").hidden = false;
  }
});
get("save-json").addEventListener("click", () => {
  saveJson(shown.coco, view.visible(), shown.file.name);
});
