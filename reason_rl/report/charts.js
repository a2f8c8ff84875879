// The curves of report.html, drawn as SVG from the JSON in #data, one section per stage. The charts of a stage share one
// cursor: hovering (or the arrow keys in a focused chart) moves it in all of them, and each legend shows the values there.
'use strict';
const DATA = JSON.parse(document.getElementById('data').textContent);

const UNITS = {
  percent: (v) => (v * 100).toFixed(Math.abs(v) >= 0.9995 || v === 0 ? 0 : 1) + '%',
  tokens: (v) => (v >= 1000 ? (v / 1000).toFixed(1) + 'k' : v.toFixed(1)),
  seconds: (v) => v.toFixed(v < 10 ? 2 : 0) + ' s',
  plain: (v) => (v === 0 ? '0' : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-4 ? v.toExponential(1) : String(+v.toPrecision(3))),
};
const train = (key, name, more) => ({from: ['train'], key, name, ...more});
const heldout = (key, name, more) => ({from: ['eval'], key, name, dots: true, ...more});
const timing = (phase, key, name, more) => ({from: ['timings', phase], key, name, ...more});

// Each curve: where its numbers are in the stage's data, and its name. `thin` draws the noisier of two curves.
const LEARNED = {title: 'What it learned', lead: 'Step 0 is the model that the stage starts from. Held-out problems are in no training data.', charts: [
  {title: 'Accuracy', about: 'right answers', unit: 'percent', range: [0, 1], wide: true,
    series: [heldout('accuracy', 'held-out', {wash: true}), train('accuracy', 'training batch', {thin: true, colour: 5})]},
  {title: 'Thinking length', about: 'mean tokens between the think tags, over all samples', unit: 'tokens', wide: true,
    series: [heldout('mean_thinking_tokens', 'held-out', {wash: true, colour: 2}), train('thinking_tokens', 'training batch', {thin: true, colour: 5})]},
  {title: 'Reward and its parts', about: 'means over the batch; the parts before weighting', unit: 'plain', series: 'reward'},
  {title: 'Samples that think', about: 'samples with any text between the think tags', unit: 'percent', range: [0, 1],
    series: [heldout('thinks_share', 'held-out'), train('thinks_share', 'training batch', {thin: true, colour: 5})]},
  {title: 'Does thinking pay?', about: 'accuracy of the samples that think, and of those that do not', unit: 'percent', range: [0, 1],
    series: [train('accuracy_given_thought', 'with a thought', {colour: 3}), train('accuracy_given_none', 'without', {colour: 2})]},
  {title: 'pass@k', about: 'problems solved at least once in k samples, before and after the stage', unit: 'percent', range: [0, 1], passAtK: true},
  {title: 'Format', about: 'completions in the template, and those cut at max_tokens', unit: 'percent', range: [0, 1],
    series: [train('format_rate', 'format kept', {colour: 3}), train('truncated_share', 'cut off', {colour: 2})]},
  {title: 'Completion length', about: 'mean tokens of a completion', unit: 'tokens', series: [train('length', 'training batch')]},
]};
const POLICY = {title: 'How the policy moved', lead: 'The effect of the updates on the distribution that it samples from.', charts: [
  {title: 'Entropy', about: 'mean per token, in nats; falls as the policy gets more certain', unit: 'plain', zero: true, series: [train('entropy', 'entropy', {wash: true})]},
  {title: 'KL', about: 'estimates per token, in nats', unit: 'plain', zero: true,
    series: [train('kl', 'KL to the reference', {colour: 4}), train('approx_kl', 'KL to old policy', {colour: 5})]},
  {title: 'Clip fractions', about: 'loss tokens whose ratio was clipped', unit: 'percent', zero: true,
    series: [train('clip_low', 'below', {colour: 2}), train('clip_high', 'above', {colour: 1})]},
  {title: 'Logprob gap', about: 'largest |sampler − trainer| on policy, in nats; 0 means equal bits', unit: 'plain', zero: true,
    series: [train('max_abs_logprob_gap', 'largest gap', {colour: 2, wash: true})]},
  {title: 'Ratio', about: 'largest and smallest exp(logprob − old_logprob)', unit: 'plain', zero: true,
    series: [train('ratio_max', 'largest'), train('ratio_min', 'smallest', {colour: 2})]},
  {title: 'Groups without signal', about: 'groups whose rewards are all equal: no advantage, no gradient', unit: 'percent', range: [0, 1],
    series: [train('groups_without_signal', 'groups', {colour: 4, wash: true})]},
  {title: 'Loss', about: 'a surrogate: its gradient matters, its value does not', unit: 'plain', series: [train('loss', 'loss')]},
  {title: 'Gradient norm', about: 'before clipping', unit: 'plain', zero: true, series: [train('grad_norm', 'norm', {colour: 3})]},
  {title: 'Loss tokens', about: 'the denominator of the loss', unit: 'tokens', zero: true, series: [train('num_loss_tokens', 'per step', {colour: 5})]},
]};
const TIME = {title: 'Where the time went', lead: '', charts: [
  {title: 'Time per phase', about: 'seconds of a step, stacked', unit: 'seconds', zero: true, stacked: true,
    series: [timing('train', 'rollout_s', 'rollout'), timing('train', 'train_s', 'training', {colour: 2}), timing('train', 'reward_s', 'reward', {colour: 3})]},
  {title: 'Throughput', about: 'tokens per second', unit: 'tokens', zero: true,
    series: [timing('train', 'rollout_tok_s', 'rollout'), timing('train', 'train_tok_s', 'training', {colour: 2}), timing('train', 'step_tok_s', 'whole step', {colour: 5})]},
  {title: 'Evaluations', about: 'seconds each; the first and the last have more problems', unit: 'seconds', zero: true,
    series: [timing('eval', 'eval_s', 'evaluation', {dots: true, colour: 4})]},
]};
const PRETRAINING = {title: '', lead: 'Next-token prediction from random weights.', charts: [
  {title: 'Loss', about: 'nats per token', unit: 'plain', wide: true, series: [train('loss', 'loss', {wash: true})]},
  {title: 'Learning rate', about: '', unit: 'plain', zero: true, wide: true, series: [train('lr', 'learning rate', {colour: 3})]},
]};
const KINDS = {pretrain: [PRETRAINING], grpo: [LEARNED, POLICY, TIME]};

// A stage of any other kind: the charts that its metrics fill, and one chart for each metric that is in none of them.
function sectionsOf(stage) {
  if (KINDS[stage.kind]) return KINDS[stage.kind];
  const drawn = new Set(['step', ...[...LEARNED.charts, ...POLICY.charts].flatMap((c) => (Array.isArray(c.series) ? c.series.map((s) => s.key) : []))]);
  const updates = POLICY.charts.map((c) => (c.title === 'Loss' ? {...c, about: ''} : c));  // its loss may be any
  const isOther = (key) => !drawn.has(key) && key !== 'reward' && !key.startsWith('reward/');
  const other = [...Object.keys(stage.train).filter(isOther).map((key) => ({key, series: [train(key, 'training')]})),
    ...Object.keys(stage.eval).filter((key) => isOther(key) && !(key in stage.train)).map((key) => ({key, series: [heldout(key, 'held-out')]}))];
  return [LEARNED, {title: 'Training', lead: '', charts: updates},
    {title: 'Further metrics', lead: '', charts: other.map(({key, series}) => ({title: key, about: '', unit: 'plain', series}))}, TIME];
}

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}
function svg(name, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const TIP = document.getElementById('tip');
// rows: [[text, text]]. (x, y) in the window; the tip stays inside the window.
function showTip(x, y, head, rows) {
  TIP.replaceChildren(element('div', {class: 'head'}, head),
    ...rows.map(([name, value]) => element('div', {class: 'row'}, element('span', {}, name), element('span', {}, value))));
  TIP.hidden = false;
  const box = TIP.getBoundingClientRect();
  TIP.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6)) + 'px';
  TIP.style.top = (y - box.height - 12 < 6 ? y + 18 : y - box.height - 12) + 'px';
}
function hideTip() { TIP.hidden = true; }

// -> [{name, colour, points: [[x, y or null]], ...}]; a series without any number is left out
function resolve(chart, stage) {
  let wanted = chart.series;
  if (wanted === 'reward') {
    const parts = Object.keys(stage.train).filter((key) => key.startsWith('reward/'));
    wanted = [train('reward', 'reward'), ...parts.map((key, i) => train(key, key.slice(7), {thin: true, colour: 2 + i % 4}))];
  }
  if (chart.passAtK) {
    return ['before', 'after'].map((when, i) => ({name: when, colour: i ? 1 : 2, dots: true, wash: false,
      points: Object.entries(stage.pass_at_k[when]).map(([k, v]) => [Math.log2(+k), v]).sort((a, b) => a[0] - b[0])})).filter((s) => s.points.length);
  }
  return wanted.map((s) => {
    const table = s.from.reduce((at, key) => at[key] || {}, stage);
    const steps = table.step || [], values = table[s.key] || [];
    return {...s, points: steps.map((x, i) => [x, values[i] === undefined ? null : values[i]])};
  }).filter((s) => s.points.some((p) => p[1] !== null));
}

function niceTicks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  const ticks = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) ticks.push(i * step);
  return ticks;
}
function yTicks(chart, stacks) {
  if (chart.range) return niceTicks(chart.range[0], chart.range[1], 4);
  const values = stacks.flatMap((s) => s.points.map((p) => p[1])).filter((v) => v !== null);
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.zero || (low > 0 && low < high / 2)) low = Math.min(0, low);
  if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(low, 0), Math.max(high, 0)];
  return niceTicks(low, high, 4);
}
// Stacks each series on the ones before it, matched by x.
function stack(series) {
  const sum = new Map();
  return series.map((s) => ({...s, points: s.points.map(([x, y]) => {
    const base = sum.get(x) || 0;
    sum.set(x, base + (y || 0));
    return [x, base + (y || 0), base];
  })}));
}

const CHARTS = [];

function draw(view) {
  const {chart, series, root} = view;
  const width = Math.max(200, root.clientWidth), height = chart.wide ? 240 : 176;
  const drawn = chart.stacked ? stack(series) : series;
  const ticks = yTicks(chart, drawn), low = ticks[0], high = ticks[ticks.length - 1];
  const label = (v) => (chart.unit === 'percent' ? +(v * 100).toPrecision(4) + '%' : chart.unit === 'tokens' && v >= 1000 ? +(v / 1000).toPrecision(4) + 'k' : UNITS.plain(v));
  const left = 10 + 6.4 * Math.max(...ticks.map((t) => label(t).length)), right = 12, top = 8, bottom = 22;
  const [x0, x1] = view.domain;
  const X = (x) => left + (x - x0) / (x1 - x0 || 1) * (width - left - right);
  const Y = (y) => top + (high - y) / (high - low) * (height - top - bottom);
  const plot = svg('svg', {class: 'plot', viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: 'img', 'aria-label':
    `${chart.title}: ${chart.about}. ` + series.map((s) => `${s.name} from ${UNITS[chart.unit](ends(s)[0])} to ${UNITS[chart.unit](ends(s)[1])}`).join('; ')});
  for (const tick of ticks) {
    plot.append(svg('line', {class: tick === 0 ? 'axis' : 'grid', x1: left, x2: width - right, y1: Y(tick), y2: Y(tick)}));
    const text = svg('text', {x: left - 7, y: Y(tick) + 4, 'text-anchor': 'end'});
    text.textContent = label(tick);
    plot.append(text);
  }
  const marks = chart.passAtK ? series[0].points.map((p) => p[0]) : niceTicks(x0, x1, width > 420 ? 6 : 4).filter((t) => t >= x0 && t <= x1 && Number.isInteger(t));
  for (const mark of marks) {
    const text = svg('text', {x: X(mark), y: height - 5, 'text-anchor': 'middle'});
    text.textContent = chart.passAtK ? 'k=' + 2 ** mark : mark;
    plot.append(text);
  }
  for (const s of drawn) paint(plot, s, X, Y, Math.max(low, 0), chart.stacked);
  const cursor = svg('g', {visibility: 'hidden'});
  plot.append(cursor);
  Object.assign(view, {plot, cursor, X, Y, drawn, width, top, floor: height - bottom});
  listen(view);
  root.querySelector('.plot')?.remove();
  root.append(plot);
}

const ends = (s) => {
  const values = s.points.map((p) => p[1]).filter((v) => v !== null);
  return [values[0], values[values.length - 1]];
};

function paint(plot, s, X, Y, floor, stacked) {
  const style = `--series: var(--c${s.colour || 1})`;
  const runs = [[]];  // a null breaks the line
  for (const p of s.points) p[1] === null ? runs.push([]) : runs[runs.length - 1].push(p);
  for (const run of runs.filter((r) => r.length)) {
    const line = run.map((p, i) => `${i ? 'L' : 'M'}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join('');
    if (stacked || (s.wash && run.length > 1)) {
      const back = [...run].reverse().map((p) => `L${X(p[0]).toFixed(1)} ${Y(stacked ? p[2] : floor).toFixed(1)}`).join('');
      plot.append(svg('path', {class: stacked ? 'area' : 'wash', d: line + back + 'Z', style}));
    }
    if (!stacked) plot.append(svg('path', {class: s.thin ? 'curve thin' : 'curve', d: run.length > 1 ? line : line + 'h0.01', style}));
    if (s.dots && run.length < 60) for (const p of run) plot.append(svg('circle', {class: 'dot', cx: X(p[0]), cy: Y(p[1]), r: 3.2, style}));
  }
}

// The point of a series at the cursor: its own at x; curves with dots are sparse and hold their last value until the next.
function at(s, x) {
  let found = null;
  for (const p of s.points) if (p[1] !== null && (s.dots ? p[0] <= x : p[0] === x)) found = p;
  return found;
}
function setCursor(axis, x) {
  for (const view of CHARTS.filter((v) => v.axis === axis && v.plot)) {
    view.cursor.replaceChildren();
    view.cursor.setAttribute('visibility', x === null ? 'hidden' : 'visible');
    if (x !== null) view.cursor.append(svg('line', {class: 'cursor', x1: view.X(x), x2: view.X(x), y1: view.top, y2: view.floor}));
    view.series.forEach((s, i) => {
      const point = x === null ? null : at(s, x);
      const value = x === null ? ends(s)[1] : point && point[1];
      view.values[i].textContent = value === null ? '–' : UNITS[view.chart.unit](value);
      const shown = point && at(view.drawn[i], x);
      if (shown) view.cursor.append(svg('circle', {class: 'here', cx: view.X(shown[0]), cy: view.Y(shown[1]), r: 4, style: `--series: var(--c${s.colour || 1})`}));
    });
  }
}
function listen(view) {
  const {plot, axis, chart, series} = view;
  const xs = [...new Set(series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
  let index = null;
  const show = (clientX, clientY) => {
    const x = xs[index], box = plot.getBoundingClientRect();
    setCursor(axis, x);
    showTip(clientX ?? box.left + view.X(x), clientY ?? box.top + 20, chart.passAtK ? `k = ${2 ** x}` : `step ${x}`,
      series.map((s) => { const p = at(s, x); return [s.name + (p && p[0] !== x ? ` (step ${p[0]})` : ''), p ? UNITS[chart.unit](p[1]) : '–']; }));
  };
  const clear = () => { index = null; setCursor(axis, null); hideTip(); };
  plot.addEventListener('pointermove', (event) => {
    const box = plot.getBoundingClientRect(), px = (event.clientX - box.left) * view.width / box.width;
    index = xs.reduce((best, x, i) => (Math.abs(view.X(x) - px) < Math.abs(view.X(xs[best]) - px) ? i : best), 0);
    show(event.clientX, event.clientY);
  });
  plot.addEventListener('pointerleave', clear);
  plot.addEventListener('blur', clear);
  plot.addEventListener('keydown', (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9}[event.key];
    if (event.key === 'Escape') clear();
    if (move === undefined) return;
    event.preventDefault();
    index = Math.max(0, Math.min(xs.length - 1, (index ?? (move < 0 ? xs.length : -1)) + move));
    show();
  });
}

function addChart(grid, chart, stage, number) {
  const series = resolve(chart, stage);
  if (!series.length) return;
  const values = series.map(() => element('b'));
  const legend = element('ul', {class: 'legend'}, ...series.map((s, i) =>
    element('li', {style: `--series: var(--c${s.colour || 1})`}, element('i'), s.name, values[i])));
  const root = element('div', {class: 'canvas'});
  grid.append(element('figure', {class: chart.wide ? 'card wide' : 'card', 'data-chart': chart.title},
    element('h4', {}, chart.title), element('p', {class: 'about'}, chart.about), legend, root));
  CHARTS.push({chart, series, values, root, axis: `${chart.passAtK ? 'k' : 'step'} ${number}`});
}
function addStage(stage, number) {
  const place = DATA.num_stages > 1 ? `Stage ${number} of ${DATA.num_stages}: ${stage.name}` : stage.name;
  const root = element('section', {id: `stage-${number}`, class: 'stage', 'aria-label': place}, element('h2', {}, place));
  document.getElementById('stages').append(root);
  for (const section of sectionsOf(stage)) {
    const grid = element('div', {class: 'charts'});
    for (const chart of section.charts) addChart(grid, chart, stage, number);
    if (!grid.children.length) continue;
    root.append(element('div', {class: 'chart-section'}, ...(section.title ? [element('h3', {}, section.title)] : []),
      ...(section.lead ? [element('p', {class: 'lead'}, section.lead)] : []), grid));
  }
}
function drawCurves() {
  DATA.stages.forEach((stage, i) => addStage(stage, i + 1));
  const axes = [...new Set(CHARTS.map((v) => v.axis))];
  for (const axis of axes) {  // the charts of an axis have one range of steps
    const views = CHARTS.filter((v) => v.axis === axis);
    const xs = views.flatMap((v) => v.series.flatMap((s) => s.points.map((p) => p[0])));
    for (const view of views) view.domain = view.chart.passAtK ? [Math.min(...xs), Math.max(...xs)] : [0, Math.max(...xs, 1)];
  }
  const redraw = () => { for (const view of CHARTS) draw(view); for (const axis of axes) setCursor(axis, null); };
  let width = innerWidth;
  addEventListener('resize', () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  redraw();
}
drawCurves();
