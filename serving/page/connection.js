// The WebSocket: sends controls, takes pictures apart, comes back when it is lost.

const PROTOCOL = "lightforcing.v1";
const HEADER = 20;
const FIRST_WAIT = 500;
const LONGEST_WAIT = 8000;
const KEY = "lightforcing-token";

export class Connection extends EventTarget {
  #socket = null;
  #wait = FIRST_WAIT;
  #timer = 0;
  #ids = 0;

  get token() { return sessionStorage.getItem(KEY); }
  set token(value) { sessionStorage.setItem(KEY, value); }
  get open() { return this.#socket?.readyState === WebSocket.OPEN; }

  /** Connect, once the server says that it is ready; asks for a token where one is needed. */
  async connect() {
    clearTimeout(this.#timer);
    const headers = this.token ? { Authorization: `Bearer ${this.token}` } : {};
    let answer;
    try {
      answer = await fetch("/v1/bundle", { headers, cache: "no-store" });
    } catch {
      return this.#retry("The server does not answer.");
    }
    if (answer.status === 401) {
      this.#emit("token", { wrong: Boolean(this.token) });
      return;
    }
    const body = await answer.json().catch(() => ({}));
    if (!answer.ok) return this.#retry(body.error?.message ?? `The server answers ${answer.status}.`);
    this.#emit("bundle", body);
    if (new URLSearchParams(location.search).get("transport") === "webrtc") return this.#call(headers, body.ice_servers);

    const protocols = this.token ? [PROTOCOL, `bearer.${this.token}`] : [PROTOCOL];
    const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/v1/stream`, protocols);
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ reason }) => {
      if (this.#socket === socket) this.#retry(reason || "The connection was lost.");
    };
    this.#socket = socket;
  }

  /** Send a control; returns the id that its receipt will carry. */
  send(type, fields = {}) {
    const id = `${type}-${++this.#ids}`;
    if (!this.open) return null;
    this.#socket.send(JSON.stringify({ type, id, ...fields }));
    return id;
  }

  acknowledge(chunk) {
    if (this.open) this.#socket.send(JSON.stringify({ type: "ack", chunk }));
  }

  /** The same over WebRTC: messages by a data channel, pictures as a track. */
  async #call(headers, servers) {
    const peer = new RTCPeerConnection({ iceServers: servers.map((urls) => ({ urls })) });
    const channel = peer.createDataChannel("control");
    const socket = { get readyState() { return channel.readyState === "open" ? WebSocket.OPEN : WebSocket.CLOSED; }, send: (text) => channel.send(text) };
    peer.addTransceiver("video", { direction: "recvonly" });
    peer.ontrack = ({ track, receiver }) => {
      receiver.jitterBufferTarget = 0;
      this.#emit("track", new MediaStream([track]));
    };
    channel.onmessage = ({ data }) => this.#receive(data);
    const gone = () => {
      if (this.#socket !== socket) return;
      peer.close();
      this.#retry("The connection was lost.");
    };
    channel.onclose = gone;
    peer.onconnectionstatechange = () => { if (peer.connectionState === "failed") gone(); };
    this.#socket = socket;
    try {
      await peer.setLocalDescription();
      await new Promise((done) => {
        if (peer.iceGatheringState === "complete") return done();
        peer.onicegatheringstatechange = () => peer.iceGatheringState === "complete" && done();
        setTimeout(done, 2000);
      });
      const { type, sdp } = peer.localDescription;
      const answer = await fetch("/v1/webrtc", {
        method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify({ type, sdp }),
      });
      const body = await answer.json();
      if (!answer.ok) throw new Error(body.error?.message ?? `The server answers ${answer.status}.`);
      await peer.setRemoteDescription(body);
    } catch (error) {
      this.#socket = null;
      peer.close();
      this.#retry(error.message);
    }
  }

  #receive(data) {
    if (typeof data !== "string") {
      const view = new DataView(data);
      const flags = view.getUint8(3);
      this.#emit("picture", {
        kind: view.getUint8(2) === 1 ? "h264" : "jpeg",
        keyframe: Boolean(flags & 1), first: Boolean(flags & 2), last: Boolean(flags & 4), gap: Boolean(flags & 8),
        chunk: view.getUint32(4, true), frame: view.getUint32(8, true), time: Number(view.getBigUint64(12, true)),
        data: new Uint8Array(data, HEADER),
      });
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "hello") this.#wait = FIRST_WAIT;
    this.#emit(message.type, message);
  }

  #retry(reason) {
    this.#socket = null;
    const wait = this.#wait * (0.75 + Math.random() / 2);
    this.#wait = Math.min(LONGEST_WAIT, this.#wait * 2);
    this.#emit("lost", { reason, wait });
    this.#timer = setTimeout(() => this.connect(), wait);
  }

  #emit(name, detail) { this.dispatchEvent(new CustomEvent(name, { detail })); }
}
