// The strip of chunks: what each cost, which one is on the screen, where a new prompt takes effect.

const KEPT = 120;
const EXPECTED = 4;
const LABEL_CHUNKS = 6; // that a label covers
const STAGES = ["denoise", "decode", "encode"];

export class Strip {
  #list;
  #chunks = new Map(); // index -> element
  #last = -1;
  #length = 0.75;
  #scale = 1.5;

  constructor(list) { this.#list = list; }

  /** Begin a new session; `length` is the usual duration of a chunk in seconds. */
  start(length) {
    this.#list.replaceChildren();
    this.#chunks.clear();
    this.#last = -1;
    this.#length = length;
    this.#scale = 1.5 * length;
  }

  /** A chunk has come, with its times in seconds. */
  add(chunk) {
    const item = this.#item(chunk.chunk);
    item.dataset.kind = "queued";
    item.title = STAGES.map((stage) => `${stage} ${milliseconds(chunk[stage])}`).join(", ");
    const total = STAGES.reduce((sum, stage) => sum + chunk[stage], 0);
    item.dataset.times = JSON.stringify(STAGES.map((stage) => chunk[stage]));
    item.querySelector(".bars").replaceChildren(...STAGES.map((stage) => element("i", stage)));
    if (total > this.#scale) this.#scale = total * 1.1;
    this.#draw();
    this.#advance(chunk.chunk);
  }

  drop(first, last) {
    for (let index = first; index < last; index++) {
      const item = this.#item(index);
      item.querySelector(".bars").replaceChildren();
      item.dataset.kind = "dropped";
    }
    if (last > first) this.#advance(last - 1);
  }

  /** A chunk begins to show. */
  show(index) {
    for (const item of this.#list.querySelectorAll('[data-kind="shown"]')) item.dataset.kind = "past";
    const item = this.#chunks.get(index);
    if (item) item.dataset.kind = "shown";
  }

  /** The server promises that a prompt takes effect at a chunk; one that was promised for it before gives way. */
  promise(index, id, prompt) {
    const item = this.#item(index);
    item.querySelector(".flag")?.remove();
    const flag = element("div", "flag");
    flag.dataset.id = id;
    // Labels of flags that stand close take turns between two lines.
    const near = [...this.#list.querySelectorAll(".flag")].filter((other) => Math.abs(other.parentElement.dataset.chunk - index) < LABEL_CHUNKS);
    flag.classList.toggle("lower", near.length > 0 && !near.at(-1).classList.contains("lower"));
    flag.append(element("span", "", prompt || "(empty prompt)"));
    item.append(flag);
    this.#scroll();
  }

  apply(index, id) {
    this.#chunks.get(index)?.querySelector(`.flag[data-id="${CSS.escape(id)}"]`)?.classList.add("applied");
  }

  #item(index) {
    let item = this.#chunks.get(index);
    if (item) return item;
    item = element("li", "chunk");
    item.dataset.kind = "expected";
    item.dataset.chunk = index;
    item.style.setProperty("--length", this.#length / this.#scale);
    item.append(element("div", "bars"), element("span", "number", index));
    const next = [...this.#list.children].find((other) => Number(other.dataset.chunk) > index);
    this.#list.insertBefore(item, next ?? null);
    this.#chunks.set(index, item);
    return item;
  }

  #advance(index) {
    this.#last = Math.max(this.#last, index);
    for (let later = this.#last + 1; later <= this.#last + EXPECTED; later++) this.#item(later);
    while (this.#list.childElementCount > KEPT) {
      this.#chunks.delete(Number(this.#list.firstElementChild.dataset.chunk));
      this.#list.firstElementChild.remove();
    }
    this.#scroll();
  }

  #draw() {
    for (const item of this.#list.children) {
      item.style.setProperty("--length", this.#length / this.#scale);
      const times = JSON.parse(item.dataset.times ?? "[]");
      [...item.querySelectorAll(".bars i")].forEach((bar, stage) => bar.style.setProperty("--part", times[stage] / this.#scale));
    }
  }

  #scroll() { this.#list.scrollLeft = this.#list.scrollWidth; }
}

export function milliseconds(seconds) {
  return seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`;
}

function element(name, kind, text) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
