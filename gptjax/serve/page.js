// What the served pages are made with. Text becomes text nodes and never HTML.
const $ = (id) => document.getElementById(id);

// An element; of what it has, functions are listeners, and false or null is not there.
function make(name, has = {}, ...inside) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(has)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...inside.filter((part) => part != null && part !== false));
  return node;
}

function icon(name) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(space, "use"));
  svg.firstChild.setAttribute("href", `#icon-${name}`);
  return svg;
}

// What the server would not do, in its own words.
class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

async function request(path, body, how = {}) {
  const about = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { ...about, ...how, headers: { "Content-Type": "application/json", ...how.headers } });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(0, "The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  const later = answer.headers.get("Retry-After");
  throw new Refused(answer.status, (error?.message ?? `The server answered ${answer.status}.`) + (later ? ` (again in ${later} s)` : ""), error?.code);
}

// Light, dark, or as the system is, which is kept where the browser keeps anything.
function themed(button, key, changed = () => {}) {
  const themes = ["", "light", "dark"], words = ["as the system", "light", "dark"], root = document.documentElement;
  const set = (theme) => {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    button.textContent = `Theme: ${words[themes.indexOf(theme)]}`;
    changed();
  };
  let kept = "";
  try { kept = localStorage.getItem(key) ?? ""; } catch { /* blocked */ }
  set(themes.includes(kept) ? kept : "");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(root.dataset.theme ?? "") + 1) % themes.length];
    set(next);
    try { localStorage.setItem(key, next); } catch { /* blocked, or full */ }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
}
