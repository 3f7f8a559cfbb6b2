// A formula that is wider than its column is set smaller, so that a phone shows the whole of it.
(() => {
  const fit = () => document.querySelectorAll('.bd-article mjx-container[display="true"]').forEach(box => {
    box.dataset.size ??= box.style.fontSize;                  // what MathJax chose to match the prose
    box.style.fontSize = box.dataset.size;
    const math = box.firstElementChild, room = box.clientWidth;
    if (!math || !room) return;
    const width = math.getBoundingClientRect().width;
    if (width > room + 1) box.style.fontSize = `${0.97 * room / width * parseFloat(getComputedStyle(box).fontSize)}px`;
  });
  window.addEventListener("load", () => (window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve()).then(fit));
  window.addEventListener("resize", fit);
})();
