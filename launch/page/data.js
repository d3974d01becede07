// The data: the main part, and parts that are read when they are opened, from this page or from the server.

const parts = new Map();
let main = embedded("main");

function embedded(name) {
  const element = document.getElementById(name);
  return element && element.type === "application/json" ? JSON.parse(element.textContent) : null;
}

// A part by its name; null where the page does not hold it.
async function part(name, version = "") {
  const key = `${name} ${version}`;
  if (!parts.has(key)) parts.set(key, await (main.live ? fetched(name) : embedded(name)));
  return parts.get(key);
}

async function fetched(name) {
  const answer = await fetch(`/${encodeURIComponent(name)}.json`);
  return answer.ok ? answer.json() : null;
}

// Clips: a player and a spectrogram, on which a line shows the place.

function clipView(clip) {
  const place = make("div", { class: "clip" }, make("p", { class: "quiet" }, said(clip.source)));
  part(clip.part).then((found) => place.prepend(...soundOf(found, clip)));
  return place;
}

function soundOf(found, clip) {
  if (found === null) return [make("p", { class: "quiet" }, "This page does not hold the sound of this clip.")];
  if (found.problem) return [make("p", { class: "quiet" }, said(found.problem))];
  const player = make("audio", { controls: true, preload: "metadata", src: found.sound, "aria-label": `clip ${clip.source}` });
  const canvas = make("canvas", { width: found.frames, height: found.mels, role: "img",
    "aria-label": `spectrogram of ${found.seconds} seconds, 0 to 8 kHz on the mel scale` });
  follow(canvas, player, found);
  return [canvas, player];
}

function follow(canvas, player, found) {
  const image = spectrogram(found);
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const draw = () => {
    paint(canvas, image, player.currentTime / found.seconds);
    if (!player.paused && !calm.matches) requestAnimationFrame(draw);
  };
  for (const name of ["play", "pause", "seeked", "timeupdate"]) player.addEventListener(name, draw);
  canvas.addEventListener("click", (event) => {
    player.currentTime = (event.offsetX / canvas.clientWidth) * found.seconds;
  });
  draw();
}

function paint(canvas, image, share) {
  const context = canvas.getContext("2d");
  context.putImageData(image, 0, 0);
  if (share > 0) {
    context.fillStyle = "#ffffff";
    context.fillRect(Math.min(Math.round(share * canvas.width), canvas.width - 1), 0, 1, canvas.height);
  }
}

// Rows of levels come from low to high frequencies; an image begins at its top.
function spectrogram({ mels, frames, levels }) {
  const bytes = Uint8Array.from(atob(levels), (sign) => sign.charCodeAt(0));
  const image = new ImageData(frames, mels);
  for (let row = 0; row < mels; row++) {
    for (let column = 0; column < frames; column++) {
      image.data.set(heat(bytes[(mels - 1 - row) * frames + column] / 255), 4 * (row * frames + column));
    }
  }
  return image;
}

// From black through violet and orange to a pale yellow.
function heat(level) {
  const stops = [[5, 5, 24], [70, 18, 98], [163, 48, 96], [234, 105, 54], [251, 180, 70], [252, 250, 190]];
  const place = level * (stops.length - 1);
  const first = Math.min(Math.floor(place), stops.length - 2);
  const mix = (channel) => stops[first][channel] + (place - first) * (stops[first + 1][channel] - stops[first][channel]);
  return [mix(0), mix(1), mix(2), 255];
}
