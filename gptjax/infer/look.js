// Tokens as a model sees them: how likely each was, and where one head attends. `parts` are the elements text, about,
// map (a canvas) and cell (an output). Give the result's `attend` a function (i, j) -> stored weight and the window.
function lookAt(parts, data) {
  const { tokens } = data, { text, about, map, cell } = parts, count = tokens.length;
  let row = Math.max(0, tokens.findIndex((t) => t.p !== null)), column = row, pointed = -1;
  let stored = () => 0, window = null;

  // Stored are square roots, so that small weights keep their digits.
  const share = (i, j) => stored(i, j) ** 2;
  const first = (i) => window ? Math.max(0, i - window + 1) : 0;
  const percent = (p) => p >= 0.0001 ? (100 * p).toPrecision(3) + " %" : p === 0 ? "0 %" : p.toExponential(1);
  const quoted = (t) => "‘" + t + "’";

  function element(name, content, parent, kind) {
    const made = document.createElement(name);
    made.textContent = content;
    if (kind) made.className = kind;
    parent.append(made);
    return made;
  }

  // Tokens
  text.replaceChildren();
  const spans = tokens.map((token, i) => {
    const span = element("span", token.text, text, token.p === null ? "before" : "");
    span.tabIndex = i === row ? 0 : -1;
    if (token.p !== null) span.style.setProperty("--rare-share", Math.min(1, -Math.log10(Math.max(token.p, 1e-9)) / 3));
    span.addEventListener("mouseenter", () => show(i));
    span.addEventListener("focus", () => show(i));
    span.addEventListener("click", () => span.focus());
    return span;
  });
  text.onkeydown = (event) => {
    const to = { ArrowRight: row + 1, ArrowLeft: row - 1, ArrowDown: row + 1, ArrowUp: row - 1, Home: 0, End: count - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    spans[Math.min(count - 1, Math.max(0, to))].focus();
  };

  // A token, and beside it in the map one that it sees, unless another is meant.
  function show(i, j = Math.min(i, Math.max(column, first(i)))) {
    spans[row].tabIndex = -1;
    spans[row].classList.remove("now");
    row = i;
    column = j;
    spans[row].tabIndex = 0;
    spans[row].classList.add("now");
    const token = tokens[i];
    about.replaceChildren();
    element("code", token.label, about);
    if (token.p === null) {
      element("p", "stands before the text", about);
    } else {
      element("p", `probability ${percent(token.p)}, rank ${token.rank.toLocaleString("en")} of ${data.vocabulary.toLocaleString("en")}`, about);
      const table = element("table", "", about);
      for (const [label, p, own] of token.tops) {
        const line = element("tr", "", table, own ? "own" : "");
        element("td", label, line);
        element("td", percent(p), line);
      }
    }
    spans.forEach((span, j) => span.style.setProperty("--seen", j <= row ? stored(row, j) : 0));
    draw();
  }

  // The heat map
  const size = Math.max(2, Math.min(22, Math.floor(760 / count))), every = Math.ceil(12 / size);
  const short = (label) => [...label].length > 12 ? [...label].slice(0, 11).join("") + "…" : label;
  const shorts = tokens.map((t) => short(t.label)), cells = document.createElement("canvas");
  const font = `${Math.min(13, Math.max(10, size - 2))}px ui-monospace, monospace`;
  let margin = 0;

  // As the canvas would be written in, whatever the property is made of.
  function colour(name) {
    map.style.color = `var(${name})`;
    return getComputedStyle(map).color;
  }
  const digits = (name) => colour(name).match(/[\d.]+/g).slice(0, 3).map(Number);

  // A pixel for each weight, which `draw` makes larger.
  function paint() {
    const [low, high, hidden] = ["--low", "--high", "--hidden"].map(digits);
    cells.width = cells.height = count;
    const pen = cells.getContext("2d"), image = pen.createImageData(count, count);
    for (let i = 0; i < count; i++) {
      for (let j = 0; j < count; j++) {
        const seen = j <= i && j >= first(i), x = seen ? stored(i, j) : 0;
        const rgb = seen ? low.map((l, k) => l + (high[k] - l) * x) : hidden;
        image.data.set([...rgb, 255], 4 * (i * count + j));
      }
    }
    pen.putImageData(image, 0, 0);
  }

  function draw() {
    const pen = map.getContext("2d"), dense = devicePixelRatio || 1;
    pen.font = font;
    margin ||= Math.ceil(Math.max(...shorts.map((t) => pen.measureText(t).width))) + 8;
    const whole = margin + size * count + 2;
    map.width = map.height = whole * dense;
    map.style.width = map.style.height = whole + "px";
    pen.scale(dense, dense);
    pen.font = font;
    pen.translate(margin, margin);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(cells, 0, 0, size * count, size * count);
    if (window && window < count) {
      pen.strokeStyle = colour("--edge");
      pen.lineWidth = 2;
      pen.beginPath();
      pen.moveTo(0, window * size);
      for (let i = window; i < count; i++) {
        pen.lineTo(first(i) * size, i * size);
        pen.lineTo(first(i) * size, (i + 1) * size);
      }
      pen.stroke();
    }
    const ink = colour("--ink"), soft = colour("--soft");
    pen.textBaseline = "middle";
    for (let i = 0; i < count; i++) {
      if (i % every && i !== row && i !== column) continue;
      if (every > 1 && [row, column].some((k) => k !== i && Math.abs(k - i) < every)) continue;
      pen.fillStyle = i === row ? ink : soft;
      pen.textAlign = "right";
      pen.fillText(shorts[i], -6, (i + 0.5) * size);
      pen.save();
      pen.translate((i + 0.5) * size, -6);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "left";
      pen.fillStyle = i === column ? ink : soft;
      pen.fillText(shorts[i], 0, 0);
      pen.restore();
    }
    pen.strokeStyle = ink;
    pen.lineWidth = 1;
    pen.strokeRect(0.5, row * size + 0.5, (row + 1) * size - 1, size - 1);
    pen.lineWidth = 2;
    pen.strokeRect(column * size, row * size, size, size);
    const beyond = column < first(row) || column > row;
    cell.value = `${row}: ${quoted(tokens[row].label)} ${beyond ? "cannot see" : "takes " + percent(share(row, column)) + " from"} ${column}: ${quoted(tokens[column].label)}`;
  }

  function choose(i, j) {
    show(Math.min(count - 1, Math.max(0, i)), Math.min(count - 1, Math.max(0, j)));
  }
  map.onmousemove = (event) => {
    const box = map.getBoundingClientRect();
    const [j, i] = [event.clientX - box.left, event.clientY - box.top].map((x) => Math.floor((x - margin) / size));
    if (i < 0 || j < 0 || i >= count || j >= count || i * count + j === pointed) return;
    pointed = i * count + j;
    choose(i, j);
  };
  map.onkeydown = (event) => {
    const by = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (!by) return;
    event.preventDefault();
    choose(row + by[0], column + by[1]);
  };

  function renew() {
    paint();
    show(row);
  }
  return {
    renew, // in other colours
    choose,
    attend(weights, width, name) {
      stored = weights;
      window = width;
      map.setAttribute("aria-label", `attention in ${name}; the arrow keys choose a row and a column`);
      renew();
    },
  };
}

// Weights of the tokens that each may see, row by row, a byte each; those of one head begin at `start`.
function lookWeights(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return (start) => (i, j) => bytes[start + i * (i + 1) / 2 + j] / 255;
}

function lookChoices(layer, head, windows, heads) {
  const option = (select, value, words) => select.add(new Option(words, value));
  windows.forEach((window, i) => option(layer, i, `${i}, ${window ? `banded, W = ${window}` : "dense"}`));
  for (let i = 0; i < heads; i++) option(head, i, i);
}
