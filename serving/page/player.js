// Shows pictures at the clip's rate. Decodes a few frames ahead and no more: decoders have few surfaces to give away.

const AHEAD = 6;
const EARLY = 2; // milliseconds
const LATEST = 100;

/** The format to ask for: H.264 where the browser decodes it here, else JPEG. WebCodecs needs HTTPS or localhost. */
export async function bestFormat(codec) {
  const asked = new URLSearchParams(location.search).get("format");
  if (asked === "jpeg" || !("VideoDecoder" in window)) return "jpeg";
  try {
    return (await VideoDecoder.isConfigSupported({ codec })).supported ? "h264" : "jpeg";
  } catch {
    return "jpeg";
  }
}

export class Player extends EventTarget {
  #screen;
  #glow;
  #decoder = null;
  #codec = "";
  #encoded = [];
  #decoding = new Map(); // presentation time -> picture
  #ready = [];
  #period = 1000 / 16;
  #due = 0;
  #starved = true;
  #running = false;
  #generation = 0;

  constructor(screen, glow) {
    super();
    this.#screen = screen;
    this.#glow = glow.getContext("2d");
  }

  /** Begin a new session. */
  start({ width, height, fps, codec }) {
    this.clear();
    this.#period = 1000 / fps;
    this.#codec = codec;
    if (this.#screen.width !== width || this.#screen.height !== height) Object.assign(this.#screen, { width, height });
    this.#screen.parentElement.style.setProperty("--aspect", width / height);
    this.resume();
  }

  /** Show a track instead: it has a clock, and frames, of its own. */
  watch(stream) {
    const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, srcObject: stream });
    const draw = () => {
      if (this.#running) {
        const { width, height } = this.#screen;
        this.#screen.getContext("2d").drawImage(video, 0, 0, width, height);
        this.#glow.drawImage(video, 0, 0, 16, 16);
        this.dispatchEvent(new CustomEvent("drawn"));
      }
      video.requestVideoFrameCallback(draw);
    };
    video.requestVideoFrameCallback(draw);
    video.play();
  }

  push(picture) {
    this.#encoded.push(picture);
    this.#feed();
  }

  pause() { this.#running = false; }

  resume() {
    if (this.#running) return;
    this.#running = true;
    this.#due = performance.now();
    requestAnimationFrame((now) => this.#tick(now));
  }

  /** Forget everything that has not been shown. */
  clear() {
    this.#generation++;
    this.#encoded = [];
    this.#ready.forEach(({ image }) => image.close());
    this.#ready = [];
    this.#decoding.clear();
    this.#starved = true;
    if (this.#decoder?.state !== "closed") this.#decoder?.close();
    this.#decoder = null;
  }

  get empty() { return !this.#encoded.length && !this.#ready.length && !this.#decoding.size; }

  #feed() {
    while (this.#encoded.length && this.#ready.length + this.#decoding.size < AHEAD) {
      const picture = this.#encoded.shift();
      this.#decoding.set(picture.time, picture);
      if (picture.kind === "jpeg") this.#decodeJpeg(picture);
      else this.#decodeH264(picture);
    }
  }

  #decodeH264(picture) {
    if (this.#decoder === null) {
      const generation = this.#generation;
      this.#decoder = new VideoDecoder({
        output: (image) => (generation === this.#generation ? this.#decoded(image.timestamp, image) : image.close()),
        error: (error) => this.dispatchEvent(new CustomEvent("broken", { detail: String(error) })),
      });
      this.#decoder.configure({ codec: this.#codec, optimizeForLatency: true });
    }
    const type = picture.keyframe ? "key" : "delta";
    this.#decoder.decode(new EncodedVideoChunk({ type, timestamp: picture.time, data: picture.data }));
  }

  async #decodeJpeg(picture) {
    const generation = this.#generation;
    const image = await createImageBitmap(new Blob([picture.data], { type: "image/jpeg" }));
    if (generation === this.#generation) this.#decoded(picture.time, image);
    else image.close();
  }

  #decoded(time, image) {
    const picture = this.#decoding.get(time);
    this.#decoding.delete(time);
    this.#ready.push({ ...picture, data: null, image });
    this.#ready.sort((one, other) => one.time - other.time); // JPEGs may overtake one another
  }

  #tick(now) {
    if (!this.#running) return;
    const due = [];
    for (let next = this.#next(); next; next = this.#next()) {
      if (this.#starved) this.#due = now;
      if (now < this.#due - EARLY) break;
      this.#starved = false;
      due.push(this.#ready.shift());
      this.#due = Math.max(this.#due + this.#period, now - LATEST);
    }
    // A screen that is slower than the video shows the newest of the pictures that are due.
    due.forEach((picture, index) => this.#show(picture, index === due.length - 1));
    this.#feed();
    if (!due.length && !this.#next() && !this.#starved && now > this.#due + this.#period / 2) {
      this.#starved = true;
      this.dispatchEvent(new CustomEvent("starved"));
    }
    requestAnimationFrame((later) => this.#tick(later));
  }

  /** The picture that comes next, once it is decoded. */
  #next() {
    const [first] = this.#ready;
    return first && ![...this.#decoding.keys()].some((time) => time < first.time) ? first : undefined;
  }

  #show(picture, seen) {
    const { width, height } = this.#screen;
    if (seen) this.#screen.getContext("2d").drawImage(picture.image, 0, 0, width, height);
    if (seen && picture.frame % 4 === 0) this.#glow.drawImage(picture.image, 0, 0, 16, 16);
    picture.image.close();
    this.#screen.dataset.chunk = picture.chunk;
    this.#screen.dataset.frame = picture.frame;
    this.dispatchEvent(new CustomEvent("shown", { detail: picture }));
  }
}
