// The pointer over a picture of `gim_jax.web.pair`: epipolar line (yellow), nearest match (magenta), homography (cyan).
(() => {
  const product = (M, p) => M.map((row) => row[0] * p[0] + row[1] * p[1] + row[2] * p[2]);
  const transpose = (M) => M[0].map((_, column) => M.map((row) => row[column]));

  const inverse = (M) => {
    const [[a, b, c], [d, e, f], [g, h, i]] = M;
    const adjugate = [
      [e * i - f * h, c * h - b * i, b * f - c * e],
      [f * g - d * i, a * i - c * g, c * d - a * f],
      [d * h - e * g, b * g - a * h, a * e - b * d],
    ];
    return adjugate.map((row) => row.map((value) => value / (a * adjugate[0][0] + b * adjugate[1][0] + c * adjugate[2][0])));
  };

  // the two ends of a x + b y + c = 0 inside [-0.5, width - 0.5] x [-0.5, height - 0.5], or null
  const clip = ([a, b, c], [width, height]) => {
    const ends = [];
    for (const x of [-0.5, width - 0.5]) if (b) ends.push([x, -(a * x + c) / b]);
    for (const y of [-0.5, height - 0.5]) if (a) ends.push([-(b * y + c) / a, y]);
    const slack = 1e-6;
    const inside = ends.filter(([x, y]) => x >= -0.5 - slack && y >= -0.5 - slack && x <= width - 0.5 + slack && y <= height - 0.5 + slack);
    inside.sort((p, q) => p[0] - q[0] || p[1] - q[1]);
    return inside.length < 2 ? null : [inside[0], inside[inside.length - 1]];
  };

  const toPicture = (point, view) => [0, 1].map((k) => (point[k] + 0.5) * view.factor[k] + (k ? 0 : view.left));
  const toImage = (x, y, view) => [(x - view.left) / view.factor[0] - 0.5, y / view.factor[1] - 0.5];
  const contains = ([x, y], [width, height]) => x >= -0.5 && y >= -0.5 && x <= width - 0.5 && y <= height - 0.5;

  const place = (element, attributes) => {
    element.toggleAttribute("hidden", !attributes);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  };

  const data = new WeakMap();
  const about = (svg) => {
    if (!data.has(svg)) data.set(svg, JSON.parse(svg.dataset.pair));
    return data.get(svg);
  };

  const show = (svg, event) => {
    const { views, points, F, H } = about(svg);
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const side = views.findIndex((view) => contains(toImage(at.x, at.y, view), view.size));
    if (side < 0) return hide(svg);
    const here = views[side], there = views[1 - side], pixel = toImage(at.x, at.y, here), point = [...pixel, 1];
    const part = (name) => svg.querySelector("." + name);
    const words = [`image ${side}: (${pixel[0].toFixed(1)}, ${pixel[1].toFixed(1)}) px`];
    svg.classList.add("hover");
    place(part("cursor"), { cx: at.x, cy: at.y });

    const line = F && product(side ? transpose(F) : F, point);
    const ends = line && clip(line, there.size);
    const [p, q] = ends ? ends.map((end) => toPicture(end, there)) : [];
    place(part("epipolar"), ends && { x1: p[0], y1: p[1], x2: q[0], y2: q[1] });
    if (F) words.push(ends ? "its epipolar line" : "its epipolar line passes outside");

    const mapped = H && product(side ? inverse(H) : H, point);
    const target = mapped && [mapped[0] / mapped[2], mapped[1] / mapped[2]];
    const lands = target && contains(target, there.size);
    place(part("mapped"), lands && { transform: `translate(${toPicture(target, there)})` });
    if (lands) words.push(`the homography maps it to (${target[0].toFixed(1)}, ${target[1].toFixed(1)})`);

    let nearest = null, best = Infinity;
    for (const row of points) {
      const distance = Math.hypot(row[2 * side] - pixel[0], row[2 * side + 1] - pixel[1]);
      if (distance < best) [nearest, best] = [row, distance];
    }
    const pair = nearest && [0, 1].map((k) => toPicture(nearest.slice(2 * k, 2 * k + 2), views[k]));
    place(part("nearest"), pair && { x1: pair[0][0], y1: pair[0][1], x2: pair[1][0], y2: pair[1][1] });
    for (const k of [0, 1]) place(part("side" + k), pair && { cx: pair[k][0], cy: pair[k][1] });
    if (nearest) {
      const own = F && product(side ? transpose(F) : F, [...nearest.slice(2 * side, 2 * side + 2), 1]);
      const far = nearest.slice(2 - 2 * side, 4 - 2 * side);
      words.push(`nearest match (${far.map((v) => v.toFixed(1)).join(", ")})` +
        (own ? `, ${(Math.abs(own[0] * far[0] + own[1] * far[1] + own[2]) / Math.hypot(own[0], own[1])).toFixed(2)} px from its line` : ""));
    }
    svg.nextElementSibling.textContent = words.join("; ");
  };

  const hide = (svg) => {
    svg.classList.remove("hover");
    for (const element of svg.querySelectorAll(".epipolar, .nearest, .cursor, .mark, .mapped")) place(element, null);
  };

  const pairOf = (event) => event.target.closest && event.target.closest("svg.gim-pair");
  let last = null;
  document.addEventListener("pointermove", (event) => {
    const svg = pairOf(event);
    if (last && last !== svg && !last.classList.contains("held")) hide(last);
    last = svg;
    if (svg && !svg.classList.contains("held")) show(svg, event);
  });
  document.addEventListener("click", (event) => {
    const svg = pairOf(event);
    if (svg) svg.classList.toggle("held");
    if (svg && !svg.classList.contains("held")) show(svg, event);
  });
})();
