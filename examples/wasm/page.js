import { loadRuntime } from "./cellstep.js";

const STEPS = 24 * 30; // streamed
const SHOWN = 24 * 10; // drawn: the last of them, when the state has settled

const element = (id) => document.getElementById(id);

/** Columns by name from a CSV file, whose first column is the time. */
function parseSeries(text) {
  const [head, ...rows] = text.trim().split("\n").map((line) => line.split(","));
  const column = (name) => {
    const at = head.indexOf(name);
    if (at < 0) throw new Error(`the series has no column ${name}, which the model wants: ${head.slice(1).join(", ")}`);
    return rows.map((row) => Number(row[at]));
  };
  return { times: rows.map((row) => row[0]), column };
}

function draw(canvas, times, lines) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const [left, right, top, bottom] = [60, 10, 10, 30];
  const values = lines.flatMap((line) => line.values);
  const [low, high] = [Math.min(0, ...values), Math.max(...values)];
  const across = (step) => left + (step / (times.length - 1)) * (width - left - right);
  const up = (value) => height - bottom - ((value - low) / (high - low || 1)) * (height - top - bottom);
  context.clearRect(0, 0, width, height);
  context.font = "16px system-ui, sans-serif";
  context.fillStyle = "#555";
  context.strokeStyle = "#ddd";
  context.lineWidth = 1;
  for (let tick = 0; tick <= 4; ++tick) {
    const value = low + (tick / 4) * (high - low);
    context.textAlign = "right";
    context.fillText(value.toFixed(0), left - 8, up(value) + 5);
    context.beginPath();
    context.moveTo(left, up(value));
    context.lineTo(width - right, up(value));
    context.stroke();
  }
  context.textAlign = "center";
  times.forEach((time, step) => {
    if (time.endsWith("T12:00")) context.fillText(time.slice(5, 10), across(step), height - 8);
  });
  context.lineWidth = 2;
  for (const { values, colour } of lines) {
    context.strokeStyle = colour;
    context.beginPath();
    values.forEach((value, step) => context.lineTo(across(step), up(value)));
    context.stroke();
  }
}

async function run(file) {
  const runtime = await loadRuntime("cellstep.wasm");
  const session = runtime.open(file);
  const series = parseSeries(await (await fetch("series.csv")).text());
  const features = session.featureNames.map(series.column);
  const target = session.outputNames[0];
  const measured = series.column(target);
  element("output").textContent = target;
  element("horizon").textContent = session.horizon;

  const begin = performance.now();
  const forecasts = [];
  for (let step = 0; step < STEPS; ++step) forecasts.push(session.step(features.map((values) => values[step]))[0]);
  const microseconds = ((performance.now() - begin) / STEPS) * 1000;

  // What stands at a step was forecast `horizon` steps before.
  const shown = Array.from({ length: SHOWN }, (_, at) => STEPS - SHOWN + at);
  draw(
    element("chart"),
    shown.map((step) => series.times[step]),
    [
      { values: shown.map((step) => measured[step]), colour: "#999" },
      { values: shown.map((step) => forecasts[step - session.horizon]), colour: "#c2410c" },
    ],
  );
  // Nine digits tell every float32 from the next.
  element("numbers").textContent = forecasts
    .map((value, step) => `${series.times[step]},${value.toPrecision(9)}`)
    .join("\n");
  element("status").textContent = `${STEPS} steps, ${microseconds.toFixed(1)} µs each.`;
}

async function show(file) {
  try {
    await run(await file);
  } catch (error) {
    element("status").textContent = `Error: ${error.message}`;
  }
}

element("file").addEventListener("change", (event) => show(event.target.files[0].arrayBuffer()));
show(fetch("forecaster.cellstep").then((answer) => answer.arrayBuffer()));
