// The live figure: a picture W = sum of z_i sigma_i u_i v_i^T, with a slider for every z. No library; the SVD is one-sided Jacobi.
(() => {
  const H = 72, N = 96, KNOBS = 8;                                            // rows, columns, voices with a slider of their own

  // A landscape, as numbers between 0 and 1: sky, sun, two mountains, water with waves.
  function picture() {
    const W = Array.from({length: H}, () => new Float64Array(N));
    for (let i = 0; i < H; i++) for (let j = 0; j < N; j++) {
      const x = j / N, y = i / H, shore = 0.66;
      let v = 0.92 - 0.45 * y;
      if ((x - 0.72) ** 2 * 1.78 + (y - 0.24) ** 2 < 0.012) v = 1;
      const hill = Math.min(shore, 0.2 + 1.35 * Math.abs(x - 0.33)), far = Math.min(shore, 0.36 + 0.9 * Math.abs(x - 0.68));
      if (y > far) v = 0.52 + 0.12 * x;
      if (y > hill) v = y < hill + 0.07 + 0.03 * Math.sin(40 * x) ? 0.97 : 0.3 + 0.16 * (x > 0.33);
      if (y > shore) v = 0.3 + 0.14 * Math.sin(34 * y + 3 * Math.sin(9 * x)) + (Math.abs(x - 0.72) < 0.05 ? 0.25 : 0);
      W[i][j] = v;
    }
    return W;
  }

  // Rotate pairs of rows of A until all are orthogonal: then A = diag(s) V^T, and the rotations, collected, are U^T.
  function svd(W) {
    const A = W.map(r => Float64Array.from(r)), R = W.map((_, i) => Float64Array.from({length: H}, (_, j) => +(i === j)));
    for (let sweep = 0, off = 1; off > 1e-9 && sweep < 40; sweep++) {
      off = 0;
      for (let p = 0; p < H; p++) for (let q = p + 1; q < H; q++) {
        let a = 0, b = 0, g = 0;
        for (let j = 0; j < N; j++) { a += A[p][j] ** 2; b += A[q][j] ** 2; g += A[p][j] * A[q][j]; }
        if (Math.abs(g) <= 1e-12 * Math.sqrt(a * b) || a * b === 0) continue;
        off = Math.max(off, Math.abs(g) / Math.sqrt(a * b));
        const zeta = (b - a) / (2 * g), t = Math.sign(zeta || 1) / (Math.abs(zeta) + Math.hypot(1, zeta)), c = 1 / Math.hypot(1, t), s = c * t;
        for (const M of [A, R]) for (let j = 0, x; j < M[p].length; j++) { x = M[p][j]; M[p][j] = c * x - s * M[q][j]; M[q][j] = s * x + c * M[q][j]; }
      }
    }
    const size = A.map(r => Math.sqrt(r.reduce((t, x) => t + x * x, 0)));
    const order = [...size.keys()].sort((i, j) => size[j] - size[i]);
    return {sigma: order.map(i => size[i]), rows: order.map(i => A[i]), left: order.map(i => R[i])};   // rows = sigma v^T, left = u
  }

  function start(box) {
    const W = picture(), {sigma, rows, left} = svd(W), z = sigma.map(() => 1);
    box.innerHTML = `<div class="live-see"><canvas width="${N}" height="${H}" role="img" aria-label="the picture W' = U diag(sigma z) V^T"></canvas>
      <svg viewBox="0 0 260 84" role="img" aria-label="singular values before and after"></svg><output></output></div><div class="live-knobs"></div>`;
    const canvas = box.querySelector("canvas"), paint = canvas.getContext("2d"), knobs = box.querySelector(".live-knobs");
    const sliders = Array.from({length: KNOBS + 1}, (_, k) => {
      const row = document.createElement("label"), name = k < KNOBS ? `z<sub>${k + 1}</sub>` : `z<sub>${KNOBS + 1}…${H}</sub>`;
      row.innerHTML = `<span>${name}</span><input type="range" min="0" max="2" step="0.01" value="1" aria-label="z ${k < KNOBS ? k + 1 : "of all the others"}"><span>1.00</span>`;
      knobs.append(row);
      row.children[1].addEventListener("input", draw);
      return row;
    });
    for (const [name, set] of [["base: z = 1", () => 1], ["the first three alone", k => +(k < 3)], ["without the first", k => +(k > 0)], ["details twice", k => 1 + (k >= 4)]]) {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = name;
      button.onclick = () => { sliders.forEach((s, k) => { s.children[1].value = set(k); }); draw(); };
      knobs.append(button);
    }
    function draw() {
      sliders.forEach((s, k) => {
        const v = +s.children[1].value;
        s.children[2].textContent = v.toFixed(2);
        for (let i = k; i < (k < KNOBS ? k + 1 : sigma.length); i++) z[i] = v;
      });
      const image = paint.createImageData(N, H), out = new Float64Array(H * N);
      let moved = 0, all = 0;
      for (let i = 0; i < H; i++) {
        moved += ((z[i] - 1) * sigma[i]) ** 2; all += sigma[i] ** 2;
        if (z[i]) for (let r = 0; r < H; r++) for (let c = 0, w = z[i] * left[i][r]; c < N; c++) out[r * N + c] += w * rows[i][c];
      }
      out.forEach((v, n) => { const g = 255 * Math.min(1, Math.max(0, v)); image.data.set([g, g, g, 255], 4 * n); });
      paint.putImageData(image, 0, 0);
      const y = s => 78 - 11 * Math.max(0, Math.log2(1 + 20 * s)) * 0.62;
      box.querySelector("svg").innerHTML = sigma.slice(0, 36).map((s, i) => `<line x1="${8 + 7 * i}" x2="${8 + 7 * i}" y1="${y(s)}" y2="${y(s * z[i])}"
        class="${z[i] > 1 ? "up" : "down"}"/><circle cx="${8 + 7 * i}" cy="${y(s)}" r="2" class="was"/><circle cx="${8 + 7 * i}" cy="${y(s * z[i])}" r="2" class="is"/>`).join("");
      box.querySelector("output").textContent = `‖W′ − W‖ / ‖W‖ = ${Math.sqrt(moved / all).toFixed(3)}`;
    }
    draw();
  }

  window.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".live-svd").forEach(start));
})();
