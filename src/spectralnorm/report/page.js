// The page around the figures: theme, the strip of samples, and which section is in view.
(() => {
  "use strict";

  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
    // A page from disk may have no storage; the choice then lasts as long as the page.
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* see above */ }
  });

  const links = new Map([...document.querySelectorAll(".bar nav a")].map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-30% 0px -69% 0px" });
  for (const id of links.keys()) watcher.observe(document.getElementById(id));

  const strip = document.querySelector(".strip");
  if (!strip) return;
  const stage = strip.querySelector(".stage"), shown = stage.querySelector("img");
  const slider = document.getElementById("strip-slider"), play = document.getElementById("strip-play");
  const film = strip.querySelector(".film"), thumbs = [...film.querySelectorAll("button")];
  const last = thumbs.length - 1, milliseconds = 220;
  let current = -1, timer = null;

  const show = (index) => {
    index = Math.max(0, Math.min(last, index));
    if (index === current) return;
    thumbs[current]?.removeAttribute("aria-current");
    current = index;
    const thumb = thumbs[index], step = Number(thumb.dataset.step), image = thumb.querySelector("img");
    shown.src = image.src;
    shown.alt = image.alt;
    slider.value = index;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    document.getElementById("strip-step").textContent = `Step ${step.toLocaleString("en")}`;
    const images = window.report.locate(step, "images"), seconds = window.report.locate(step, "seconds");
    document.getElementById("strip-seen").textContent = images === null || !step ? (step ? "" : "before training")
      : `${Math.round(images).toLocaleString("en")} real images seen, ${window.report.duration(seconds)} of training`;
    thumb.setAttribute("aria-current", "true");
    // Only the film moves, not the page.
    film.scrollLeft = thumb.offsetLeft - film.offsetLeft - (film.clientWidth - thumb.offsetWidth) / 2;
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.classList.remove("playing");
    play.setAttribute("aria-label", "Play");
  };
  const start = () => {
    if (current === last) show(0);
    play.classList.add("playing");
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => { current < last ? show(current + 1) : stop(); }, milliseconds);
  };

  play.addEventListener("click", () => (timer === null ? start() : stop()));
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  thumbs.forEach((thumb, index) => thumb.addEventListener("click", () => { stop(); show(index); }));
  stage.addEventListener("keydown", (event) => {
    const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: last }[event.key];
    if (event.key === " ") play.click();
    else if (target !== undefined) { stop(); show(target); } else return;
    event.preventDefault();
  });
  show(last);
})();
