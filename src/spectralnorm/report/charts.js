// Draws the figures as SVG from the JSON in #figures. Colours are CSS variables, so a change of theme needs no redrawing.
(() => {
  "use strict";

  const figures = JSON.parse(document.getElementById("figures").textContent);
  const timeline = figures.timeline;
  const shared = { axis: "step", smoothing: 2 };
  const charts = [];

  const element = (name, attributes = {}, parent = null, text = "") => {
    const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "clipPath", "defs"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  };

  // A word names a colour; a number is a place on the ramp from 0 to 1.
  const color = (name) => {
    if (/^[a-z]+$/.test(name)) return `var(--${name})`;
    const place = Number(name) * 4, low = Math.min(3, Math.floor(place));
    return `color-mix(in oklab, var(--ramp-${low + 1}) ${Math.round(100 * (place - low))}%, var(--ramp-${low}))`;
  };

  const number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("e+", "e").replace(/-/g, "−");
    return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 6 : 4 }).replace("-", "−");
  };
  const tickText = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return `${number(value / 1e6)}M`;
    if (size >= 1e4) return `${number(value / 1e3)}k`;
    return number(value);
  };
  const duration = (seconds) => {
    if (seconds < 60) return `${number(Number(seconds.toPrecision(3)))} s`;
    const parts = [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]].find(([length]) => seconds >= length);
    const rest = Math.floor((seconds % parts[0]) / parts[2]);
    return `${Math.floor(seconds / parts[0])} ${parts[1]}${rest ? ` ${rest} ${parts[3]}` : ""}`;
  };

  const linearTicks = (low, high, count) => {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
    const ticks = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(Number((index * step).toPrecision(12)));
    return ticks;
  };
  const logTicks = (low, high) => {
    const decades = Math.log10(high / low), ticks = [];
    const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    const every = Math.max(1, Math.ceil(decades / 6));
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      if (decades > 3 && power % every) continue;
      for (const factor of factors) {
        const tick = Number((factor * 10 ** power).toPrecision(12));
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
      }
    }
    return ticks;
  };

  // Seconds are shown in the unit that suits the whole axis.
  const axisOf = (highest) => {
    if (shared.axis === "step") return { label: "step", unit: 1 };
    if (shared.axis === "images") return { label: "images seen", unit: 1 };
    if (highest > 7200) return { label: "hours of training", unit: 3600 };
    return highest > 180 ? { label: "minutes of training", unit: 60 } : { label: "seconds of training", unit: 1 };
  };

  // Where a step lies on the chosen axis, between two points that were logged.
  const locate = (step, axis) => {
    const steps = timeline.step, values = timeline[axis];
    if (axis === "step" || !steps.length) return axis === "step" ? step : null;
    const after = steps.findIndex((other) => other >= step);
    if (after < 0) return values[values.length - 1];
    const before = after > 0 ? { step: steps[after - 1], value: values[after - 1] } : { step: 0, value: 0 };
    const span = steps[after] - before.step;
    return span > 0 ? before.value + ((step - before.step) / span) * (values[after] - before.value) : values[after];
  };

  // Mean over a centred window, cut off at both ends, so that nothing lags.
  const smooth = (values, percent) => {
    const reach = Math.round((values.length * percent) / 100);
    if (reach < 1) return values;
    return values.map((value, index) => {
      if (value === null) return null;
      const first = Math.max(0, index - reach), last = Math.min(values.length - 1, index + reach);
      let sum = 0, count = 0;
      for (let other = first; other <= last; other++) if (values[other] !== null) { sum += values[other]; count++; }
      return sum / count;
    });
  };

  class Chart {
    constructor(figure, spec) {
      this.spec = spec;
      this.plot = figure.querySelector(".plot");
      this.hidden = new Set();
      this.logY = Boolean(spec.log);
      this.logX = false;
      this.only = null;
      this.buildKeys();
      this.canvas = element("div", {}, this.plot);
      this.tip = element("div", { class: "tip", hidden: "", "aria-live": "polite" }, this.plot);
      this.draw();
    }

    buildKeys() {
      const keys = element("div", { class: "keys" }, this.plot);
      if (this.spec.series.length > 1) {
        this.spec.series.forEach((series, index) => {
          const key = element("button", { type: "button", "aria-pressed": "true" }, keys);
          element("i", { style: `background:${color(series.color)}` }, key);
          key.append(series.name);
          key.addEventListener("click", () => {
            this.hidden.has(index) ? this.hidden.delete(index) : this.hidden.add(index);
            key.setAttribute("aria-pressed", String(!this.hidden.has(index)));
            this.draw();
          });
          key.addEventListener("pointerenter", () => this.emphasize(index));
          key.addEventListener("pointerleave", () => this.emphasize(null));
        });
      }
      for (const rule of this.spec.rules ?? []) {
        const key = element("span", { class: "rule-key" }, keys);
        element("i", { style: `color:${color(rule.color)}` }, key);
        key.append(`${rule.label}: ${number(rule.y)}`);
      }
      const options = element("span", { class: "options" }, keys);
      const option = (text, title, pressed, act) => {
        const button = element("button", { type: "button", title, "aria-pressed": String(pressed) }, options, text);
        button.addEventListener("click", () => {
          const now = button.getAttribute("aria-pressed") !== "true";
          button.setAttribute("aria-pressed", String(now));
          act(now);
          this.draw();
        });
      };
      const values = this.spec.series.flatMap((series) => series.low ?? series.y).filter((value) => value !== null);
      if (values.length && Math.min(...values) > 0 && !this.spec.fromZero) option("log", "Logarithmic vertical axis", this.logY, (now) => { this.logY = now; });
      else this.logY = false;
      if (this.spec.kind === "ranks") option("log rank", "Logarithmic horizontal axis", false, (now) => { this.logX = now; });
    }

    // The series that are shown, each with its abscissae on the chosen axis and the line to draw.
    visible() {
      return this.spec.series
        .map((series, index) => {
          const x = this.spec.kind === "ranks" ? series.x : (this.spec.kind === "points" ? series.x : timeline)[shared.axis];
          const line = this.spec.smooth ? smooth(series.y, shared.smoothing) : series.y;
          return { ...series, index, x, line, paint: color(series.color) };
        })
        .filter((series) => !this.hidden.has(series.index));
    }

    draw() {
      const width = Math.max(240, this.plot.clientWidth), tall = this.plot.closest(".wide") ? 400 : 270;
      const height = width < 480 ? 250 : tall;
      const shown = this.visible(), rules = this.spec.rules ?? [];
      const xs = shown.flatMap((series) => [series.x[0], series.x[series.x.length - 1]]);
      const ys = shown.flatMap((series) => [...(series.low ?? series.y), ...(series.high ?? [])])
        .concat(shown.flatMap((series) => (series.error ?? []).flatMap((error, i) => (error === null || series.y[i] === null ? [] : [series.y[i] - error, series.y[i] + error]))))
        .concat(rules.map((rule) => rule.y)).filter((value) => value !== null && (!this.logY || value > 0));
      this.canvas.replaceChildren();
      this.tip.hidden = true;
      if (!ys.length) { element("p", { class: "note" }, this.canvas, "Every curve is hidden; press a name to show it."); return; }

      const ranks = this.spec.kind === "ranks";
      let [left, right] = [ranks ? 1 : Math.min(...xs, 0), Math.max(...xs)];
      if (this.spec.kind === "points" && timeline.step.length) right = Math.max(right, timeline[shared.axis].at(-1));
      if (right <= left) right = left + 1;
      const axis = ranks ? { label: this.spec.xLabel, unit: 1 } : axisOf(right);
      let bottom = ys.reduce((a, b) => Math.min(a, b)), top = ys.reduce((a, b) => Math.max(a, b));
      if (this.spec.fromZero || (this.spec.kind === "points" && bottom > 0 && !this.logY)) bottom = Math.min(0, bottom);
      if (this.logY) { bottom /= 1.12; top *= 1.12; } else {
        const air = (top - bottom || Math.abs(top) || 1) * 0.06;
        top += air; bottom -= bottom === 0 ? 0 : air;
      }
      const yTicks = this.logY ? logTicks(bottom, top) : linearTicks(bottom, top, height / 50);
      const margin = { top: 14, right: 14, bottom: 40, left: 12 + 7 * Math.max(3, ...yTicks.map((tick) => tickText(tick).length)) };
      const inner = { width: width - margin.left - margin.right, height: height - margin.top - margin.bottom };
      const ratioX = (x) => (this.logX ? Math.log(x / left) / Math.log(right / left) : (x - left) / (right - left));
      const ratioY = (y) => (this.logY ? Math.log(y / bottom) / Math.log(top / bottom) : (y - bottom) / (top - bottom));
      const px = (x) => margin.left + inner.width * ratioX(x);
      const py = (y) => margin.top + inner.height * (1 - ratioY(y));

      const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0, "aria-label": this.describe(shown) }, this.canvas);
      for (const tick of yTicks) {
        element("line", { class: "grid", x1: margin.left, x2: width - margin.right, y1: py(tick), y2: py(tick) }, svg);
        element("text", { x: margin.left - 8, y: py(tick) + 4, "text-anchor": "end" }, svg, tickText(tick));
      }
      const xTicks = this.logX ? logTicks(left, right) : linearTicks(left / axis.unit, right / axis.unit, inner.width / 85).map((tick) => tick * axis.unit);
      const room = width < 480 ? 2 : 1;
      xTicks.forEach((tick, index) => {
        if (this.logX && index % room) return;
        element("line", { class: "axis", x1: px(tick), x2: px(tick), y1: height - margin.bottom, y2: height - margin.bottom + 5 }, svg);
        const end = px(tick) > width - 24 ? "end" : "middle";
        element("text", { x: end === "end" ? width : px(tick), y: height - margin.bottom + 19, "text-anchor": end }, svg, tickText(Number((tick / axis.unit).toPrecision(6))));
      });
      element("line", { class: "axis", x1: margin.left, x2: width - margin.right, y1: height - margin.bottom, y2: height - margin.bottom }, svg);
      element("text", { x: margin.left + inner.width / 2, y: height - 5, "text-anchor": "middle" }, svg, axis.label);
      if (this.spec.kind === "timeline") for (const step of figures.resumed) {
        const x = px(locate(step, shared.axis) ?? step);
        const mark = element("line", { class: "resumed", x1: x, x2: x, y1: margin.top, y2: height - margin.bottom }, svg);
        element("title", {}, mark, `resumed at step ${step}`);
      }
      for (const rule of rules) {
        if (this.logY && rule.y <= 0) continue;
        element("line", { class: "rule", stroke: color(rule.color), x1: margin.left, x2: width - margin.right, y1: py(rule.y), y2: py(rule.y) }, svg);
      }

      const path = (xs, values) => {
        let text = "", pen = "M";
        values.forEach((value, index) => {
          if (value === null || (this.logY && value <= 0)) { pen = "M"; return; }
          text += `${pen}${px(xs[index]).toFixed(1)} ${py(value).toFixed(1)}`;
          pen = "L";
        });
        return text;
      };
      this.groups = new Map();
      for (const series of shown) {
        const group = element("g", { class: "series" }, svg);
        this.groups.set(series.index, group);
        const many = shown.length > 4;
        if (series.low && !many) {
          const both = series.low.map((low, index) => ({ x: series.x[index], low, high: series.high[index] })).filter((point) => point.low !== null && (!this.logY || point.low > 0));
          const edge = [...both.map((point) => [point.x, point.high]), ...both.reverse().map((point) => [point.x, point.low])];
          element("path", { class: "band", fill: series.paint, d: `M${edge.map(([x, y]) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("L")}Z` }, group);
        }
        if (series.line !== series.y && !many) element("path", { class: "raw", stroke: series.paint, d: path(series.x, series.y) }, group);
        element("path", { class: "curve", stroke: series.paint, d: path(series.x, series.line) }, group);
        // A lone value makes no line: it is shown as a dot.
        if (this.spec.kind === "points" || series.y.length === 1) series.y.forEach((y, index) => {
          if (y === null || (this.logY && y <= 0)) return;
          const error = series.error?.[index];
          if (error && (!this.logY || y > error)) element("line", { class: "error", stroke: series.paint, x1: px(series.x[index]), x2: px(series.x[index]), y1: py(y - error), y2: py(y + error) }, group);
          element("circle", { class: "dot", fill: series.paint, cx: px(series.x[index]), cy: py(y), r: 4.5 }, group);
        });
      }
      this.view = { svg, shown, px, py, margin, height, width, axis };
      this.cursor = element("g", {}, svg);
      svg.addEventListener("pointermove", (event) => this.point(event));
      svg.addEventListener("pointerdown", (event) => this.point(event));
      svg.addEventListener("pointerleave", () => this.leave());
      svg.addEventListener("blur", () => this.leave());
      svg.addEventListener("keydown", (event) => this.key(event));
    }

    describe(shown) {
      const ends = shown.slice(0, 6).map((series) => {
        const values = series.line.filter((value) => value !== null);
        return values.length ? `${series.name} from ${number(values[0])} to ${number(values.at(-1))}` : `${series.name} without values`;
      });
      const more = shown.length > 6 ? `, and ${shown.length - 6} more` : "";
      return `${this.spec.title}: ${ends.join(", ")}${more}. Arrow keys read the values.`;
    }

    point(event) {
      const box = this.view.svg.getBoundingClientRect(), scale = this.view.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      const reference = this.longest();
      let best = 0;
      reference.x.forEach((value, index) => { if (Math.abs(this.view.px(value) - x) < Math.abs(this.view.px(reference.x[best]) - x)) best = index; });
      this.show(reference.x[best], y);
    }

    longest() {
      return this.view.shown.reduce((one, other) => (other.x.length > one.x.length ? other : one));
    }

    key(event) {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") this.leave();
      if (move === undefined) return;
      event.preventDefault();
      const xs = this.longest().x, stride = Math.max(1, Math.round(xs.length / 60));
      this.place = Math.max(0, Math.min(xs.length - 1, (this.place ?? (move > 0 ? -stride : xs.length)) + move * stride));
      this.show(xs[this.place], null);
    }

    show(x, y) {
      const { shown, px, py, margin, height, width, axis } = this.view;
      const found = shown.map((series) => {
        let best = 0;
        series.x.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(series.x[best] - x)) best = index; });
        return { series, index: best, value: series.line[best] };
      }).filter(({ series, index, value }) => value !== null && (!this.logY || value > 0) && Math.abs(px(series.x[index]) - px(x)) < 12);
      if (!found.length) return this.leave();
      found.sort((one, other) => other.value - one.value);
      const near = y === null ? null : found.reduce((one, other) => (Math.abs(py(other.value) - y) < Math.abs(py(one.value) - y) ? other : one));
      this.cursor.replaceChildren();
      element("line", { class: "cursor", x1: px(x), x2: px(x), y1: margin.top, y2: height - margin.bottom }, this.cursor);
      for (const item of found) element("circle", { class: "dot", fill: item.series.paint, cx: px(item.series.x[item.index]), cy: py(item.value), r: item === near ? 5.5 : 3.5 }, this.cursor);
      if (near && shown.length > 3) this.emphasize(near.series.index);

      this.tip.replaceChildren();
      const head = this.spec.kind === "ranks" ? `rank ${number(x)}` : axis.label === "step" || axis.label === "images seen" ? `${axis.label} ${x.toLocaleString("en")}` : duration(x);
      element("p", {}, this.tip, head);
      const limit = 12, from = near ? Math.max(0, Math.min(found.length - limit, found.indexOf(near) - limit / 2)) : 0;
      for (const item of found.slice(from, from + limit)) {
        const row = element("div", item === near && found.length > 1 ? { class: "near" } : {}, this.tip);
        element("i", { style: `background:${item.series.paint}` }, row);
        element("span", {}, row, item.series.name);
        const error = item.series.error?.[item.index];
        element("span", {}, row, number(item.value) + (error ? ` ± ${number(Number(error.toPrecision(2)))}` : ""));
      }
      this.tip.hidden = false;
      const box = this.view.svg.getBoundingClientRect(), scale = box.width / width, at = px(x) * scale;
      const over = this.view.svg.getBoundingClientRect().top - this.plot.getBoundingClientRect().top;
      const room = this.plot.clientWidth - at, beside = room > this.tip.offsetWidth + 16 || room > at ? at + 16 : at - 16 - this.tip.offsetWidth;
      const clamped = Math.max(0, Math.min(beside, this.plot.clientWidth - this.tip.offsetWidth));
      this.tip.style.transform = `translate(${clamped}px, ${over + margin.top * scale}px)`;
    }

    leave() {
      this.cursor?.replaceChildren();
      this.tip.hidden = true;
      this.place = undefined;
      this.emphasize(null);
    }

    emphasize(index) {
      for (const [other, group] of this.groups ?? []) group.classList.toggle("faded", index !== null && other !== index && this.groups.has(index));
    }
  }

  for (const figure of document.querySelectorAll("[data-chart]")) {
    figure.querySelector("details.numbers").open = false;
    charts.push(new Chart(figure, figures.charts[figure.dataset.chart]));
  }
  const redraw = () => charts.forEach((chart) => chart.draw());

  const slider = document.getElementById("smoothing");
  const tellSmoothing = () => {
    const points = timeline.step.length, reach = Math.round((points * shared.smoothing) / 100);
    const steps = points > 1 ? Math.round((reach * (timeline.step.at(-1) - timeline.step[0])) / (points - 1)) : 0;
    document.getElementById("smoothing-text").textContent = reach ? `± ${steps.toLocaleString("en")} steps` : "off";
  };
  if (slider) {
    slider.addEventListener("input", () => { shared.smoothing = Number(slider.value); tellSmoothing(); redraw(); });
    for (const choice of document.querySelectorAll("input[name=axis]")) choice.addEventListener("change", () => { shared.axis = choice.value; redraw(); });
    tellSmoothing();
  }

  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; requestAnimationFrame(redraw); } });

  window.report = { locate, duration };
})();
