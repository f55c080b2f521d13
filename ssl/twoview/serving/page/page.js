"use strict";

const part = (id) => document.getElementById(id);
const LOST = "The server cannot be reached. It may have been stopped.";
let file = null; // the image that is searched for
let running = null; // its request
let largest = Infinity; // bytes

async function json(response) {
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.detail || `The server answered with ${response.status}.`);
  return content;
}

async function about() {
  try {
    const facts = await json(await fetch("health"));
    part("about").textContent = `${facts.images.toLocaleString("en")} images of ${facts.index}`;
    part("k").value = facts.k;
    largest = facts.max_upload;
  } catch (error) {
    part("about").textContent = error instanceof TypeError ? LOST : error.message;
  }
}

// Control characters would change how a name is shown, such as its suffix.
const plain = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");

function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = plain(text); // never as HTML: names of files may hold anything
  if (parent) parent.append(made);
  return made;
}

function item(neighbor) {
  const one = document.createElement("li");
  const figure = element("figure", "", one);
  const picture = element("div", "", figure);
  picture.className = "picture";
  const name = neighbor.path.split(/[\\/]/).pop() || `entry ${neighbor.id}`;
  const image = element("img", "", picture);
  image.alt = plain(name);
  image.onerror = () => { picture.textContent = "no picture here"; };
  image.src = neighbor.thumbnail;
  const caption = element("figcaption", "", figure);
  caption.title = plain(neighbor.path);
  element("bdi", name, caption);
  if (neighbor.label) element("span", neighbor.label, caption);
  element("span", `similarity ${neighbor.similarity.toFixed(3)}`, caption);
  return one;
}

async function search() {
  if (!file) return;
  if (running) running.abort();
  const own = new AbortController();
  running = own;
  part("error").textContent = "";
  part("results").replaceChildren();
  part("status").textContent = "Searching.";
  try {
    if (file.size > largest) throw new Error(`The image is larger than ${largest.toLocaleString("en")} bytes.`);
    const k = encodeURIComponent(part("k").value);
    const headers = { "Content-Type": file.type.startsWith("image/") ? file.type : "application/octet-stream" };
    const found = await json(await fetch(`search?k=${k}`, { method: "POST", body: file, headers, signal: own.signal }));
    part("results").replaceChildren(...found.neighbors.map(item));
    part("status").textContent = `${found.neighbors.length} most similar images`;
  } catch (error) {
    if (own.signal.aborted) return; // another image has been chosen
    part("status").textContent = "";
    part("error").textContent = error instanceof TypeError ? LOST : error.message;
  }
}

function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  const shown = part("shown");
  URL.revokeObjectURL(shown.src);
  shown.hidden = false;
  shown.onerror = () => { shown.hidden = true; }; // a browser shows fewer formats than the server reads
  shown.src = URL.createObjectURL(file);
  part("name").textContent = plain(file.name);
  part("query").hidden = false;
  search();
}

part("picture").addEventListener("change", (event) => choose(event.target.files[0]));
part("k").addEventListener("change", search);
part("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); document.body.classList.remove("over"); });
}
document.addEventListener("drop", (event) => {
  if (event.dataTransfer.files.length) {
    part("picture").files = event.dataTransfer.files; // shows the name
    choose(event.dataTransfer.files[0]);
  } else part("error").textContent = "Drop an image file; links and text are not searched for.";
});
document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
about();
