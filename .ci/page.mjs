#!/usr/bin/env node
/* page.mjs CHROMIUM FOLDER: the page in a browser, used as people use it.

CHROMIUM is the browser's program, FOLDER one with node_modules/puppeteer-core. All keys and clicks are events of the
browser's own: nothing sets a field's value or calls a handler, so what no person can do fails here too. Proxies and a
fake Z.ai run on loopback. A line for each check; status 1 if one fails.
*/
import { spawn } from "node:child_process";
import { mkdtempSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const [chromium, folder] = process.argv.slice(2);
const library = createRequire(resolve(folder) + "/").resolve("puppeteer-core");
const { default: puppeteer } = await import(pathToFileURL(library));
const PROXY = join(dirname(fileURLToPath(import.meta.url)), "..", "ztoapi.py");
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const sleep = ms => new Promise(done => setTimeout(done, ms));

let failures = 0;
function check(name, holds, found = "") {
  if (!holds) failures += 1;
  console.log(`${holds ? "ok  " : "FAIL"}  ${name}${holds ? "" : `: ${JSON.stringify(found)}`}`);
}
function same(name, found, expected) {
  check(name, JSON.stringify(found) === JSON.stringify(expected), { found, expected });
}

// The fake Z.ai: what it says depends on the user's last words, and on the key.

const MARKDOWN = `# A heading with *italic*
Words in **bold**, *italic*, ***both***, _italic_ and \`code with * and <b>\`; snake_case_name, 2 * 3 * 4, \\*no\\*.
- one
  - two
    - three
      1. four
      2. five
    - six
- seven

  still seven
- eight
> A quote
> - with an item
>
> > and a quote in it

1. first
   \`\`\`js
   const a = "- no item";

     const b = 1 < 2;
   \`\`\`
2. second
---
| Name | What it is | Number |
|:-----|:----------:|-------:|
| **a** | \`x \\| y\` | 1 |
| a_name_that_is_rather_long_for_a_narrow_screen | another_rather_long_name_to_make_it_wide | 2 |

[a link](https://example.com/a_(b)?c=d), https://example.com/bare. And (http://example.com/x).
[no link](javascript:alert(1)) [nor this](data:text/html,x) [nor that](/stats) ![image](file:///etc/passwd)
<b>HTML</b> <img src=x onerror="alert(1)"> <script>alert(2)</script> &amp; <a href="https://example.com">no</a>
~~~
<i>a fence of tildes</i>
\`\`\`
~~~
*the end*`;
let refused = false;
let hungUp = 0;

function said(messages) {
  const words = messages.at(-1).content;
  if (words.startsWith("markdown")) return [MARKDOWN, words.endsWith("whole") ? 1e6 : 3];
  if (words.startsWith("long")) return ["A line of the answer.\n".repeat(60), 200];
  return [`You said: ${words} (${messages.length} messages)`, 8];
}
async function answerChat(request, response) {
  let body = "";
  for await (const part of request) body += part;
  const { messages } = JSON.parse(body);
  if (refused) {
    response.writeHead(401, { "Content-Type": "application/json" });
    return response.end('{"error": {"code": "1000", "message": "Authentication Failed"}}');
  }
  const tell = (delta, more = {}) =>
    response.write(`data: ${JSON.stringify({ choices: [{ index: 0, delta, ...more }], ...more.top })}\n\n`);
  response.on("close", () => { hungUp += !response.writableFinished; });
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  const [text, size] = said(messages);
  tell({ reasoning_content: "Let me think. " });
  for (let place = 0; place < text.length; place += size) {
    tell({ content: text.slice(place, place + size) });
    await sleep(4);  // so that many pieces are drawn alone
  }
  while (messages.at(-1).content === "endless" && !response.closed) {
    tell({ content: "more " });
    await sleep(10);
  }
  const usage = { prompt_tokens: 12, completion_tokens: 3456, total_tokens: 3468 };
  tell({ content: "" }, { finish_reason: "stop", top: { usage } });
  response.end("data: [DONE]\n\n");
}

// The proxies

const children = [];
async function startProxy(settings) {
  const env = { PATH: process.env.PATH, PORT: "0", ZAI_API_KEY: "an-id.a-secret-of-z.ai", ...settings };
  const child = spawn("python3", ["-B", PROXY], { env, stdio: ["ignore", "pipe", "ignore"] });
  children.push(child);
  let printed = "";
  for await (const part of child.stdout) {
    printed += part;
    const found = printed.match(/Page: (\S+)/);
    if (found) return found[1];
  }
  throw new Error("The proxy did not start: " + printed);
}

// A person

let page;
let complaints = [];
const press = (...keys) => keys.reduce((before, key) => before.then(() => page.keyboard.press(key)), Promise.resolve());
// In ASCII: for other letters puppeteer inserts the text, which is not what a keyboard does.
const type = text => page.keyboard.type(text);
async function hold(modifier, ...keys) {
  await page.keyboard.down(modifier);
  await press(...keys);
  await page.keyboard.up(modifier);
}
async function click(selector, options) {
  const place = await page.$eval(selector, node => {
    node.scrollIntoView({ block: "center" });
    const { left, top, width, height } = node.getBoundingClientRect();
    return { x: left + Math.min(width / 2, 60), y: top + height / 2 };
  });
  await page.mouse.click(place.x, place.y, options);
}
const look = (test, ...values) => page.evaluate(test, ...values);
const value = () => look(() => document.getElementById("message").value);
const focus = () => look(() => document.activeElement.id || document.activeElement.textContent);
const state = () => look(() => document.getElementById("state").textContent);
const isHidden = id => look(id => document.getElementById(id).hidden, id);
const answers = () => look(() => [...document.querySelectorAll(".text")].map(node => node.innerText.trim()));
const ended = () => until(() => document.getElementById("send").textContent === "Send");
async function until(test) {
  for (let left = 500; left && !(await look(test)); left--) await sleep(20);
  return look(test);
}
async function ask(words) {
  await click("#message");
  await hold("Control", "a");
  await type(words);
  await press("Enter");
}
async function tabTo(test, back = false) {
  if (back) await page.keyboard.down("Shift");
  for (let left = 80; left && !(await look(test)); left--) await press("Tab");
  if (back) await page.keyboard.up("Shift");
  return look(test);
}
/* What the clipboard holds, by pasting it. */
async function pasted() {
  await click("#message");
  await hold("Control", "a");
  await press("Backspace");
  await hold("Control", "v");
  const text = await value();
  await hold("Control", "a");
  await press("Backspace");
  return text;
}
async function visit(browser, url) {
  if (page) await page.close();
  page = await browser.newPage();
  complaints = [];
  page.on("console", message => complaints.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", error => complaints.push(String(error)));
  page.on("requestfailed", request => complaints.push(`${request.url()} ${request.failure().errorText}`));
  await page.setViewport({ width: 1280, height: 900 });
  await page.goto(url);
}
function checkConsole(name, expected = /^$/) {
  same(`${name}: nothing else in the console`, complaints.filter(line => !expected.test(line)), []);
}

// What is looked at in the page

/* The texts whose contrast is below 4.5, by WCAG's formula. */
function faint() {
  const rgb = color => color.match(/[\d.]+/g).map(Number);
  const light = color => {
    const [red, green, blue] = color.map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *:not(script, option)")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility() || node.disabled) continue;
    const style = getComputedStyle(node);
    let back = node;
    while (back && (rgb(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement;
    const paint = node instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [paint, getComputedStyle(back ?? document.body).backgroundColor].map(rgb).map(light);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) found.push([node.textContent.slice(0, 30), contrast.toFixed(1)]);
  }
  return found;
}
function isOnScreen(id) {
  const { top, bottom, left, right, height } = document.getElementById(id).getBoundingClientRect();
  const covers = document.elementFromPoint((left + right) / 2, (top + bottom) / 2);
  return height > 0 && top >= 0 && bottom <= innerHeight && right <= innerWidth && covers?.id === id;
}
const overflow = () => document.scrollingElement.scrollWidth - document.documentElement.clientWidth;

// The tests, in the order a person would do them

async function firstVisit() {
  await until(() => document.getElementById("model").options.length > 9);
  const seen = await look(() => [...document.querySelectorAll("h2")].filter(node => node.checkVisibility())
    .map(node => node.firstChild.data.trim()));
  same("first visit: Chat, then Connect, and no Numbers yet", seen, ["Chat", "Connect"]);
  same("first visit: the cursor is in the message", await focus(), "message");
  const options = await look(() => [...document.getElementById("model").options].map(({ text }) => text));
  check("the free models come first, then those with vision, and one of the free is chosen",
    /free/.test(options[0]) && options.map(text => +!/free/.test(text) + +!/free|vision/.test(text)).join("")
      .match(/^0+1+2+$/) && await look(() => document.getElementById("model").selectedOptions[0].text.includes("free")),
    options);
}

async function typing() {
  await type("Hello wrld!?");
  await press("Backspace", "ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowLeft");
  await type("o");
  same("letters, Backspace and arrows", await value(), "Hello world!");
  await press("Home", "Delete");
  await type("J");
  await press("End");
  await hold("Shift", "Enter");
  await type("two");
  same("Home, End, Delete; Shift+Enter starts a line", await value(), "Jello world!\ntwo");
  await hold("Control", "a", "c");
  await press("ArrowRight");
  await hold("Control", "v");
  same("Ctrl+A, Ctrl+C, Ctrl+V", await value(), "Jello world!\ntwoJello world!\ntwo");
  await hold("Control", "z");
  same("Ctrl+Z", await value(), "Jello world!\ntwo");
  await press("Tab");
  same("Tab leaves the field", [await focus(), await value()], ["send", "Jello world!\ntwo"]);
  await hold("Shift", "Tab");
  same("Shift+Tab comes back", await focus(), "message");
  const order = [];
  for (let left = 5; left; left--) {
    await press("Tab");
    order.push(await focus());
  }
  same("Tab goes on, from control to control", order.slice(0, 3), ["send", "model", "thinking"]);
  check("what has the focus shows it", await look(() =>
    getComputedStyle(document.activeElement).outlineStyle === "solid"));
}

async function twoTurns() {
  await ask("First");
  check("Enter sends", await ended());
  same("the answer", await answers(), ["You said: First (1 messages)"]);
  same("the message was sent, and the field is empty again", await value(), "");
  await type("Second");
  await click("#send");
  await ended();
  same("a second turn, by mouse, knows the first", (await answers())[1], "You said: Second (3 messages)");
  check("numbers come with the traffic", await until(() => document.getElementById("tokens").innerText.includes("24")));
  const rows = await look(() => [...document.querySelectorAll("#tokens td")].map(node => node.textContent));
  same("tokens by model", rows.slice(0, 3), ["glm-4.7-flash", "24", "6,912"]);
  const totals = await look(() => document.getElementById("totals").textContent);
  check("no total is zero", /^2 answered \u00b7 [\d.]+ tokens\/s \u00b7 first word after \d+ ms$/.test(totals), totals);
  check("the chart shows", await look(() => document.querySelector("#chart path").getBBox().height > 1));
}

async function stopping() {
  await type("endless");
  await press("Enter");
  await until(() => document.getElementById("log").innerText.includes("more more"));
  await press("Tab");
  same("Tab goes to Stop", await look(() => document.activeElement.textContent), "Stop");
  const before = hungUp;
  await press(" ");
  await ended();
  same("Stop by keyboard", await look(() => document.getElementById("outcome").textContent), "Stopped");
  same("and the cursor is in the message again", await focus(), "message");
  for (let left = 100; left && hungUp === before; left--) await sleep(20);
  check("Z.ai is hung up on", hungUp > before);
}

async function copying(url, key) {
  await tabTo(() => document.activeElement.textContent === "curl");
  check("Tab reaches Copy of the example", await tabTo(() => document.activeElement.textContent === "Copy"));
  await press("Enter");
  check("Copy says so", await until(() => document.activeElement.textContent === "Copied"));
  const copied = await pasted();
  check("Copy by keyboard: the whole example, with the key in use",
    copied.startsWith(`curl ${url}v1/chat/completions`) && copied.includes(`Bearer ${key}"`), copied);
  await tabTo(() => document.activeElement.textContent === "Codex");
  await press("Enter");
  await tabTo(() => document.activeElement.textContent === "Copy");
  await press("Enter");
  const codex = await pasted();
  check("the example for Codex needs no variable", codex.includes(`experimental_bearer_token="${key}"`), codex);
}

async function markdown() {
  await ask("markdown in pieces");
  await until(() => document.querySelector("article:last-child li") !== null);
  const item = await page.$("article:last-child .text h3");
  await ended();
  check("a finished line stays as an element", await item.evaluate(node => node.isConnected));
  await ask("markdown whole");
  await ended();
  const [pieces, whole] = await look(() =>
    [...document.querySelectorAll(".text")].slice(-2).map(node => node.innerHTML));
  same("the same from pieces as from a whole", pieces, whole);
  const found = await look(() => {
    const text = [...document.querySelectorAll(".text")].at(-1);
    const all = selector => [...text.querySelectorAll(selector)].map(node => node.textContent);
    return {
      headings: all("h3"), bold: all("p strong"), italic: all("em"), codes: all("p code"), rules: all("hr").length,
      heads: all("th"), cells: all("td"), quotes: all("blockquote blockquote"), quoted: all("blockquote li"),
      deep: all("ul ul ul ol li"), items: [...text.children].filter(node => node.localName === "ul")
        .map(node => node.children.length), seventh: all("ul > li > p"), fences: all("pre"), inItem: all("ol > li pre"),
      numbers: [...text.children].filter(node => node.localName === "ol").map(node => node.children.length),
      links: [...text.querySelectorAll("a")].map(node => [node.href, node.target, node.rel, node.textContent]),
      foreign: all("b, i, img, script, iframe, svg"), words: text.textContent,
    };
  });
  const { words, ...rest } = found;
  const code = "const a = \"- no item\";\n\n  const b = 1 < 2;\n";
  same("Markdown", rest, {
    headings: ["A heading with italic"], bold: ["bold", "both"],
    italic: ["italic", "italic", "both", "italic", "the end"],
    codes: ["code with * and <b>"], rules: 1, heads: ["Name", "What it is", "Number"],
    cells: ["a", "x | y", "1", "a_name_that_is_rather_long_for_a_narrow_screen",
      "another_rather_long_name_to_make_it_wide", "2"],
    quotes: ["and a quote in it"], quoted: ["with an item"], deep: ["four", "five"], items: [3],
    seventh: ["still seven"], fences: [code, "<i>a fence of tildes</i>\n```\n"], inItem: [code], numbers: [2],
    links: [["https://example.com/a_(b)?c=d", "a link"], ["https://example.com/bare", "https://example.com/bare"],
      ["http://example.com/x", "http://example.com/x"], ["https://example.com/", "https://example.com"]]
      .map(([href, text]) => [href, "_blank", "noreferrer", text]), foreign: [],
  });
  for (const part of ["[no link](javascript:alert(1))", "[nor this](data:text/html,x)", "(/stats)",
    "(file:///etc/passwd)", "<img src=x onerror=\"alert(1)\">", "<script>alert(2)</script> &amp; <a href=",
    "snake_case_name, 2 * 3 * 4, *no*."])
    check(`it stays text: ${part}`, words.includes(part), words);
  await tabTo(() => document.activeElement.textContent === "Copy answer" &&
    document.activeElement.closest("article") === document.querySelector("#log article:last-child"), true);
  await press("Enter");
  same("Copy answer by keyboard gives its source", await pasted(), MARKDOWN);
}

async function reloading() {
  const before = await answers();
  await page.reload();
  await until(() => document.getElementById("model").options.length > 9);
  same("a reload keeps the conversation", await answers(), before);
  await type("After");
  await press("Enter");
  await ended();
  check("and the next turn knows it", (await answers()).at(-1).includes(`(${2 * before.length + 1} messages)`),
    (await answers()).at(-1));
  await tabTo(() => document.activeElement.id === "new");
  await press("Enter");
  await until(() => document.activeElement.id === "message");
  same("New chat", [await answers(), await focus()], [[], "message"]);
  check("says how to get the old one back", await tabTo(() => /old chat/.test(document.activeElement.textContent)));
  await press("Enter");
  same("and gives it back", (await answers()).length, before.length + 1);
  await click("#new");
  await page.reload();
  same("a new chat is new after a reload too", await answers(), []);
  await ask("endless");
  await until(() => document.getElementById("log").innerText.includes("more more"));
  await page.reload();
  const rest = await look(() => document.getElementById("log").innerText);
  check("a reload in the midst keeps what had come, and says so", /more more[^]*Stopped/.test(rest), rest);
}

async function narrow() {
  await page.setViewport({ width: 390, height: 844, hasTouch: true, isMobile: true });
  await ask("long");
  await ended();
  check("390 px: Send is on the screen after a chat", await look(isOnScreen, "send"));
  check("390 px: and the end of the answer", await look(() => {
    const { left, bottom } = document.querySelector("article:last-child .quiet").getBoundingClientRect();
    return Boolean(document.elementFromPoint(left + 5, bottom - 5)?.closest("article"));
  }));
  await look(() => scrollTo(0, 0));
  check("390 px: and from the top of the page", await look(isOnScreen, "send"));
  await page.setViewport({ width: 844, height: 390 });
  await look(() => scrollTo(0, 0));
  check("and with the phone on its side", await look(isOnScreen, "send"));
  await page.setViewport({ width: 320, height: 568 });
  await ask("markdown whole");
  await ended();
  same("320 px: no sideways scroll", await look(overflow), 0);
  check("320 px: Send is on the screen", await look(() => scrollTo(0, 0)) || await look(isOnScreen, "send"));
}

async function colours() {
  for (const scheme of ["light", "dark"]) {
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    const back = await look(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g)[0] > 127);
    same(`${scheme}: is ${scheme}`, back, scheme === "light");
    same(`${scheme}: every text has enough contrast`, await look(faint), []);
  }
}

async function ownKey(url, keys) {
  await until(() => document.getElementById("key-form").checkVisibility());
  same("a key of one's own: the page asks for it", [await focus(), await isHidden("key-form")], ["key", false]);
  await type("a-wrong-key");
  await press("Enter");
  check("a wrong key is told", await until(() => document.getElementById("state").textContent.includes("401")));
  same("and can be typed again", [await focus(), await isHidden("key-form")], ["key", false]);
  await type(keys[0]);
  await press("Enter");
  await until(() => document.activeElement.id === "message");
  same("the right key is taken", [await isHidden("key-form"), await state(), await focus()], [true, "", "message"]);
  check("no key is on the screen", !(await look(() => document.documentElement.innerHTML)).includes(keys[0]));
  await copying(url, keys[0]);
  await click(".columns figure:last-child pre", { count: 3 });
  await hold("Control", "c");
  same("Ctrl+C on the hidden key copies it", (await pasted()).trim(), keys[0]);
  await click("#change");
  same("the key can be changed", await focus(), "key");
  await type(keys[1]);
  await press("Enter");
  await until(() => document.activeElement.id === "message");
  await type("Hi");
  await press("Enter");
  await ended();
  check("and the other is used", await until(() =>
    document.querySelector("#recent td:nth-child(8)")?.textContent === "#2"));
  await page.reload();
  same("a reload keeps the key", await isHidden("key-form"), true);
}

async function missingKey() {
  check("a missing ZAI_API_KEY is told at once",
    await until(() => /^ZAI_API_KEY is not set/.test(document.getElementById("state").textContent)), await state());
  check("with a link", await look(() => document.querySelector("#state a").href.includes("z.ai")));
}

async function refusedKey() {
  refused = true;
  await ask("Hello");
  await ended();
  check("a refused ZAI_API_KEY: the answer says so", /Failed.*ZAI_API_KEY/.test(await look(() =>
    document.querySelector("article:last-child .bad").textContent)));
  same("and what was asked can be sent again", await value(), "Hello");
  check("the page says so", await until(() => /ZAI_API_KEY/.test(document.getElementById("state").textContent)));
  refused = false;
  await press("Enter");
  await ended();
  check("until Z.ai takes it", await until(() => document.getElementById("state").textContent === ""));
  same("what failed is no part of the conversation", (await answers()).at(-1), "You said: Hello (1 messages)");
}

const zai = createServer((request, response) => { answerChat(request, response); });
await new Promise(done => zai.listen(0, "127.0.0.1", done));
const ZAI_BASE_URL = `http://127.0.0.1:${zai.address().port}`;
const keys = ["sk-the-first-key", "sk-the-second-key"];
let browser;
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1));
process.on("exit", () => {
  browser?.process()?.kill();
  children.forEach(child => child.kill());
});
setTimeout(() => {
  check("it ends within 90 s", false);
  process.exit(1);
}, 90000);
try {
  const [usual, own, missing] = await Promise.all([startProxy({ ZAI_BASE_URL }),
    startProxy({ ZAI_BASE_URL, DEFAULT_KEY: keys.join() }), startProxy({ ZAI_BASE_URL, ZAI_API_KEY: "" })]);
  const userDataDir = mkdtempSync(join(folder, "profile-"));
  browser = await puppeteer.launch({ executablePath: chromium, args: FLAGS, userDataDir });
  await visit(browser, usual);
  for (const test of [firstVisit, typing, twoTurns, stopping]) await test();
  await copying(usual, "sk-your-key");
  for (const test of [markdown, reloading, narrow, colours]) await test();
  checkConsole("all that", /chat\/completions net::ERR_ABORTED/);
  await visit(browser, own);
  await ownKey(own, keys);
  checkConsole("a key of one's own", /status of 401/);
  await visit(browser, missing);
  await missingKey();
  await colours();
  checkConsole("a missing key");
  await visit(browser, usual);
  await refusedKey();
  checkConsole("a refused key", /status of 40[03]/);
} catch (error) {
  check("nothing unforeseen", false, error.stack);
}
await browser?.close();
console.log(failures ? `${failures} failed` : "all is well");
process.exit(failures ? 1 : 0);
