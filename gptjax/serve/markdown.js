// Markdown as DOM nodes: paragraphs, headings, lists, quotes, tables, fences, rules; emphasis, code, links. Text is only
// ever put in as text, pictures are shown as links, and a link leads to http, https or mailto or is none.
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/, HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/, RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/, ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(\s+|$)/, DIVIDER = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 12; // quotes and lists within each other, of a text that would have more

function markdown(text, into) {
  into.replaceChildren();
  markdownBlocks(text.replace(/\t/g, "    ").split("\n"), into, 0);
}

function markdownBlocks(lines, into, depth) {
  let i = 0;
  const startsBlock = (at) => FENCE.test(lines[at]) || HEADING.test(lines[at]) || RULE.test(lines[at]) || QUOTE.test(lines[at]) || ITEM.test(lines[at]);
  const isTable = (at) => lines[at].includes("|") && lines[at + 1]?.includes("-") && lines[at + 1].includes("|") && DIVIDER.test(lines[at + 1]);
  while (i < lines.length) {
    const line = lines[i];
    let found;
    if (!line.trim()) {
      i++;
    } else if ((found = FENCE.exec(line))) {
      const inside = [], mark = found[1], end = (each) => each.trim().startsWith(mark) && !each.trim().replaceAll(mark[0], "");
      for (i++; i < lines.length && !end(lines[i]); i++) inside.push(lines[i]);
      i++;
      into.append(markdownCode(inside.join("\n"), found[2].trim().split(/\s/)[0]));
    } else if ((found = HEADING.exec(line))) {
      into.append(markdownInline(found[2], make(`h${Math.min(6, found[1].length + 2)}`)));
      i++;
    } else if (RULE.test(line)) {
      into.append(make("hr"));
      i++;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const inside = [];
      for (; i < lines.length && lines[i].trim() && (QUOTE.test(lines[i]) || !startsBlock(i)); i++) inside.push(lines[i].replace(QUOTE, ""));
      markdownBlocks(inside, into.appendChild(make("blockquote")), depth + 1);
    } else if (ITEM.test(line) && depth < DEEPEST) {
      i = markdownList(lines, i, into, depth);
    } else if (isTable(i)) {
      const head = markdownCells(line), rows = [];
      const sides = markdownCells(lines[i + 1]).map((cell) => /^:?-+:$/.test(cell) ? (cell[0] === ":" ? "middle" : "right") : null);
      for (i += 2; i < lines.length && lines[i].trim() && lines[i].includes("|"); i++) rows.push(markdownCells(lines[i]));
      const row = (cells, kind) => make("tr", {}, ...head.map((_, k) => markdownInline(cells[k] ?? "", make(kind, { class: sides[k] }))));
      const table = make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, ...rows.map((cells) => row(cells, "td"))));
      into.append(make("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "table" }, table));
    } else {
      const inside = [line];
      for (i++; i < lines.length && lines[i].trim() && !startsBlock(i) && !isTable(i); i++) inside.push(lines[i]);
      into.append(markdownInline(inside.map((each) => each.trimStart()).join("\n"), make("p")));
    }
  }
}

function markdownCode(text, language) {
  const pre = make("pre", { tabindex: 0 }, make("code", {}, text));
  return make("figure", { class: "code" }, make("figcaption", {}, make("span", {}, language || "text")), pre);
}

// An item goes on with lines that stand as far in as its text, or without a blank line between.
function markdownList(lines, i, into, depth) {
  const first = ITEM.exec(lines[i])[2], ordered = /\d/.test(first), kind = first.at(-1);
  const list = into.appendChild(make(ordered ? "ol" : "ul", { start: ordered && parseInt(first) !== 1 && parseInt(first) }));
  while (i < lines.length) {
    const found = ITEM.exec(lines[i]);
    if (!found || found[2].at(-1) !== kind || (/\d/.test(found[2]) !== ordered) || RULE.test(lines[i])) break;
    const width = found[0].length, inside = [lines[i].slice(width)];
    for (i++; i < lines.length; i++) {
      const blank = !lines[i].trim(), deep = lines[i].search(/\S/) >= Math.min(width, found[1].length + 2);
      if (blank ? !(lines[i + 1]?.search(/\S/) >= found[1].length + 2) : !deep && (ITEM.test(lines[i]) || HEADING.test(lines[i]) || FENCE.test(lines[i]) || !lines[i - 1].trim())) break;
      inside.push(lines[i].slice(Math.min(width, Math.max(0, lines[i].search(/\S/)))));
    }
    markdownBlocks(inside, list.appendChild(make("li")), depth + 1);
    while (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i++;
  }
  return i;
}

const markdownCells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

const SPANS = new RegExp([
  /\\([!-/:-@[-`{-~])/, // 1: a mark that is none
  /(`+)([^`](?:[^]{0,2000}?[^`])?)\2(?!`)/, // 3: code
  /!?\[([^\]\n]{0,500})\]\(\s*<?([^\s()<>]{0,1000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500})?)>?(?:\s+"[^"\n]{0,300}")?\s*\)/, // 4, 5: a link
  /<((?:https?:|mailto:)[^\s<>]{1,1000})>/, // 6: an address in brackets
  /\b(https?:\/\/[^\s<>()]{0,1000}[^\s<>().,;:!?'"*_`\]])/, // 7: or alone
  /(\*\*|__)(?=\S)([^]{0,2000}?\S)\8/, // 9: strong
  /(?:\*(?=[^\s*])([^*]{0,2000}?[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([^_]{0,2000}?[^\s_])_(?!\w)|(?:\*|(?<!\w)_)([^\s*_])(?:\*|_(?!\w)))/, // 10, 11, 12
  /~~(?=\S)([^]{0,2000}?\S)~~/, // 13: struck out
  / *(\n)/, // 14
].map((each) => each.source).join("|"), "g");

function markdownInline(text, into) {
  let at = 0;
  for (const found of text.matchAll(SPANS)) {
    into.append(text.slice(at, found.index));
    at = found.index + found[0].length;
    const [, mark, , code, words, target, bracketed, alone, , strong, star, line, one, struck, end] = found;
    const slanted = star ?? line ?? one;
    if (mark) into.append(mark);
    else if (code !== undefined) into.append(make("code", {}, code.replace(/^ (.*) $/s, "$1")));
    else if (target !== undefined) into.append(markdownLink(target, words || target, found[0]));
    else if (bracketed ?? alone) into.append(markdownLink(bracketed ?? alone, bracketed ?? alone, found[0]));
    else if (strong) into.append(markdownInline(strong, make("strong")));
    else if (slanted) into.append(markdownInline(slanted, make("em")));
    else if (struck) into.append(markdownInline(struck, make("del")));
    else if (end) into.append(make("br"));
  }
  into.append(text.slice(at));
  return into;
}

// Words that lead somewhere, or, where nobody should go, the text as it was.
function markdownLink(target, words, text) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return text;
  return make("a", { href: target, rel: "noopener noreferrer", target: "_blank" }, words);
}
