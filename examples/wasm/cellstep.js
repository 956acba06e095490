// A .cellstep file in the browser: cellstep.wasm holds the runtime, this file the way to it from JavaScript.

const MODEL_BYTES = 64; // CELLSTEP_MODEL_BYTES
const PAGE = 65536;

/** Fetches and starts the runtime. */
export async function loadRuntime(url) {
  const { instance } = await WebAssembly.instantiate(await (await fetch(url)).arrayBuffer());
  instance.exports._initialize?.();
  return new Runtime(instance.exports);
}

class Runtime {
  constructor(exports) {
    this.exports = exports;
    this.end = exports.__heap_base.value;
  }

  /** Memory at a cache line. It is never given back: a page that loads many models starts a runtime for each. */
  reserve(size) {
    const begin = Math.ceil(this.end / 64) * 64;
    this.end = begin + size;
    const missing = this.end - this.exports.memory.buffer.byteLength;
    if (missing > 0) this.exports.memory.grow(Math.ceil(missing / PAGE));
    return begin;
  }

  /** The text of a pointer to a C string, or null. */
  text(pointer) {
    if (!pointer) return null;
    const bytes = new Uint8Array(this.exports.memory.buffer, pointer);
    return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)));
  }

  check(status) {
    if (status) throw new Error(this.text(this.exports.cellstep_status_text(status)));
  }

  /** Calls a function whose last argument is where it puts a pointer; the pointer. */
  make(name, ...values) {
    const place = this.reserve(4);
    this.check(this.exports[name](...values, place));
    return new DataView(this.exports.memory.buffer).getUint32(place, true);
  }

  /** A session on the bytes of a deploy file (an ArrayBuffer), in the initial state. */
  open(file) {
    const data = this.reserve(file.byteLength);
    new Uint8Array(this.exports.memory.buffer, data).set(new Uint8Array(file));
    const memory = this.reserve(MODEL_BYTES);
    const model = this.make("cellstep_model_init", memory, MODEL_BYTES, data, file.byteLength, 0);
    const size = this.exports.cellstep_memory_required(model);
    const session = this.make("cellstep_session_init", model, this.reserve(size), size);
    this.check(this.exports.cellstep_session_selftest(session, 0));
    return new Session(this, model, session);
  }
}

class Session {
  constructor(runtime, model, session) {
    this.runtime = runtime;
    this.session = session;
    const info = runtime.reserve(32);
    runtime.check(runtime.exports.cellstep_model_get_info(model, info));
    const values = new Uint32Array(runtime.exports.memory.buffer, info, 8);
    [this.inputSize, this.outputSize] = values;
    this.horizon = values[5];
    const names = (call, count) =>
      Array.from({ length: count }, (_, index) => runtime.text(runtime.exports[call](model, index)));
    this.featureNames = names("cellstep_model_feature_name", this.inputSize);
    this.outputNames = names("cellstep_model_output_name", this.outputSize);
    this.x = runtime.reserve(4 * this.inputSize);
    this.y = runtime.reserve(4 * this.outputSize);
  }

  /** Moves one time step: the inputs in, the outputs out. */
  step(inputs) {
    const { memory, cellstep_session_step } = this.runtime.exports;
    new Float32Array(memory.buffer, this.x, this.inputSize).set(inputs);
    this.runtime.check(cellstep_session_step(this.session, this.x, this.y));
    return new Float32Array(memory.buffer, this.y, this.outputSize).slice();
  }
}
