// The server's load and the state of what it has loaded, asked while the page is seen.

import { getJson } from "./api.js";
import { byId, el, svg } from "./dom.js";
import { LoadedAdapters } from "./loaded.js";

// A key's requests may be limited, so the page asks no more than it needs.
const STATS_MS = 2000;
const ADAPTERS_MS = 6000;
const PATIENCE_MS = 10000; // after an error
const MOST_POINTS = 60;
const WIDTH = 240;
const HEIGHT = 36;

export class Load {
  #panel = byId("load-panel");
  #loaded = new LoadedAdapters();
  #last = null;
  #rates = [];
  #timer = 0;
  #names = "";
  #mayStats = true;
  #adaptersAt = -Infinity;
  onModels = async () => {};
  onUnauthorized = () => {};
  onError = () => {};

  constructor() {
    this.#loaded.onChange = () => this.askAdaptersNow();
    this.#loaded.onError = (text) => this.onError(text);
    document.addEventListener("visibilitychange", () => this.#begin());
  }

  /** Ask everything now, perhaps with another key, and go on asking. */
  start() {
    this.#names = "";
    this.#mayStats = true;
    this.askAdaptersNow();
  }

  askAdaptersNow() {
    this.#adaptersAt = -Infinity;
    this.#begin();
  }

  #begin() {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#ask();
  }

  async #ask() {
    let wait = STATS_MS;
    try {
      if (performance.now() - this.#adaptersAt >= ADAPTERS_MS) await this.#askAdapters();
      if (this.#mayStats) await this.#askStats();
    } catch (error) {
      if (error.status === 401) {
        this.onUnauthorized();
        return; // until there is another key
      }
      this.#loaded.fail(error.message);
      wait = Math.max(PATIENCE_MS, 1000 * (error.retryAfter || 0));
    }
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#begin(), wait);
  }

  async #askAdapters() {
    const { data, may_load: mayLoad } = await getJson("/v1/adapters");
    const names = JSON.stringify(data.map(({ name }) => name));
    if (names !== this.#names) await this.onModels();
    this.#names = names;
    this.#adaptersAt = performance.now();
    this.#loaded.show(data, mayLoad);
  }

  async #askStats() {
    try {
      this.#showStats(await getJson("/v1/stats"));
    } catch (error) {
      if (error.status !== 403) throw error;
      this.#mayStats = false;
      const text = "This key may not see the server's load.";
      this.#panel.replaceChildren(el("p", { className: "muted small", textContent: text }));
    }
  }

  #showStats(now) {
    const before = this.#last;
    this.#last = now;
    if (before && now.time_s > before.time_s) {
      this.#rates.push((now.new_tokens - before.new_tokens) / (now.time_s - before.time_s));
      this.#rates = this.#rates.slice(-MOST_POINTS);
    }
    const rate = this.#rates.at(-1);
    const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
    const facts = [
      ["running", now.running],
      ["waiting", now.waiting],
      ["cache in use", percent(now.cache_blocks_held, now.cache_blocks)],
      ["drafts accepted", percent(now.drafts_accepted, now.drafts)],
    ];
    this.#panel.replaceChildren(
      el("p", { className: "rate" }, el("strong", { textContent: rate?.toFixed(1) ?? "–" }), " tokens/s"),
      this.#spark(),
      el("dl", { className: "facts" }, ...facts.flatMap(([name, value]) => {
        return [el("dt", { textContent: name }), el("dd", { textContent: value })];
      })),
    );
  }

  #spark() {
    const most = Math.max(1, ...this.#rates);
    const step = WIDTH / (MOST_POINTS - 1);
    const start = WIDTH - (this.#rates.length - 1) * step;
    const points = this.#rates.map((rate, place) =>
      `${(start + place * step).toFixed(1)},${(HEIGHT - 2 - (rate / most) * (HEIGHT - 4)).toFixed(1)}`);
    const text = `Tokens per second of the last two minutes, at most ${most.toFixed(1)}`;
    const size = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
    const chart = svg("svg", { class: "spark", role: "img", "aria-label": text, ...size });
    const line = { points: points.join(" "), "vector-effect": "non-scaling-stroke" };
    if (points.length > 1) chart.append(svg("polyline", line));
    return chart;
  }
}
