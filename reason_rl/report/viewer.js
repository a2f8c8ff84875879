// The viewer of sampled rollouts in report.html: stage, step, group, completion; tokens coloured by advantage or logprob.
// Its state is in the URL's hash (#stage=grpo&step=10&group=0&sample=3&colour=logprob), so that a view can be linked to.
// Text of a model or a problem is set with textContent, never as markup.
'use strict';
const ROLLOUTS = DATA.rollouts;  // [{stage, steps: [{step, groups}]}]
const VIEW = {stage: ROLLOUTS.length - 1, step: Infinity, group: 0, sample: 0, colour: 'advantage', token: null};  // go() clamps
const steps = () => ROLLOUTS[VIEW.stage].steps;
const $ = (id) => document.getElementById(id);
const signed = (v, digits = 2) => (v === null ? '–' : (v > 0 ? '+' : v < 0 ? '−' : '') + Math.abs(v).toFixed(digits));
const mix = (name, share) => `color-mix(in srgb, var(--${name}) ${(share * FULL[name] * 100).toFixed(0)}%, transparent)`;
const STRONGEST = 2.5;  // the advantage that gets the full colour; a logprob's colour is 1 - probability
const FULL = {good: 0.5, bad: 0.5, surprise: 0.75};  // less than 1, so that the text stays readable

// Shows the code of control and direction characters: they are invisible, or reorder the line.
function visible(token) {
  return token.replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]/g,
    (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0')).replace(/\n/g, '⏎\n');
}
const isRight = (s) => (!s.is_graded ? null : s.parts.accuracy === undefined ? undefined : s.parts.accuracy > 0.5);
const verdict = (s) => ({true: ['✓', 'is-right', 'right'], false: ['✗', 'is-wrong', 'wrong'], null: ['!', 'is-open', 'not graded'],
  undefined: ['·', '', '']})[String(isRight(s))];
const group = () => steps()[VIEW.step].groups[VIEW.group];
const sample = () => group().samples[VIEW.sample];

function tint(s, i) {
  if (VIEW.colour === 'advantage') {
    if (s.advantage === null) return 'transparent';
    return mix(s.advantage >= 0 ? 'good' : 'bad', Math.min(1, Math.abs(s.advantage) / STRONGEST));
  }
  const logprob = s.logprobs[i];
  return logprob === undefined || logprob === null ? 'transparent' : mix('surprise', 1 - Math.exp(Math.min(0, logprob)));
}
function facts(s, i) {
  const logprob = s.logprobs[i];
  const known = logprob !== undefined && logprob !== null;
  return [['logprob', known ? logprob.toFixed(4) + ' nats' : '–'], ['probability', known ? (Math.exp(logprob) * 100).toFixed(2) + '%' : '–'],
    ['advantage', signed(s.advantage, 3)]];
}

function renderChoices() {
  $('stage-control').hidden = ROLLOUTS.length < 2;
  $('stage-select').replaceChildren(...ROLLOUTS.map((s, i) => new Option(s.stage, String(i), false, i === VIEW.stage)));
  $('step-select').replaceChildren(...steps().map((s, i) => new Option(String(s.step), String(i), false, i === VIEW.step)));
  $('group-select').replaceChildren(...steps()[VIEW.step].groups.map((g, i) => {
    const right = g.samples.filter((s) => isRight(s) === true).length;
    return new Option(`${i + 1} · ${right} of ${g.samples.length} right`, String(i), false, i === VIEW.group);
  }));
  $('step-back').disabled = VIEW.step === 0;
  $('step-on').disabled = VIEW.step === steps().length - 1;
  $('group-back').disabled = VIEW.group === 0;
  $('group-on').disabled = VIEW.group === steps()[VIEW.step].groups.length - 1;
  $('colour-' + VIEW.colour).checked = true;
  const [from, to, gradient] = VIEW.colour === 'advantage'
    ? ['−2.5', '+2.5', `linear-gradient(90deg, ${mix('bad', 1)}, transparent, ${mix('good', 1)})`]
    : ['p = 1', 'p = 0', `linear-gradient(90deg, transparent, ${mix('surprise', 1)})`];
  const bar = element('span', {class: 'bar'});
  bar.style.background = gradient;
  $('scale').replaceChildren(from, bar, to);
}
function renderProblem() {
  const g = group();
  $('prompt').textContent = g.prompt ?? '';
  $('answer').textContent = g.answer ?? '';
  $('level').textContent = [g.level === null ? '' : `level ${g.level}`, g.problem_id === null ? '' : `problem ${g.problem_id}`].filter(Boolean).join(' · ');
}
function renderSamples() {
  const list = $('samples');
  list.replaceChildren(...group().samples.map((s, i) => {
    const [sign, look, word] = verdict(s);
    const row = element('div', {class: 'sample', role: 'option', id: `sample-${i}`, 'aria-selected': String(i === VIEW.sample),
      'aria-label': `completion ${i + 1}, ${word}, reward ${s.reward}, ${s.tokens.length} tokens`});
    const fill = element('i'), share = s.advantage === null ? 0 : Math.min(1, Math.abs(s.advantage) / STRONGEST) * 50;
    fill.style.width = share + '%';
    fill.style[s.advantage >= 0 ? 'left' : 'right'] = '50%';
    fill.style.background = `var(--${s.advantage >= 0 ? 'good' : 'bad'})`;
    row.append(element('span', {class: look}, sign), element('span', {class: 'num'}, s.reward === null ? '–' : s.reward.toFixed(2)),
      element('span', {class: 'balance', title: `advantage ${signed(s.advantage)}`}, fill), element('span', {class: 'preview'}, visible(s.tokens.slice(0, 80).join(''))));
    row.addEventListener('click', () => go({sample: i}));
    return row;
  }));
  list.setAttribute('aria-activedescendant', `sample-${VIEW.sample}`);
  const chosen = list.children[VIEW.sample];
  if (chosen.offsetTop < list.scrollTop + list.offsetTop) list.scrollTop = chosen.offsetTop - list.offsetTop - 6;
  const below = chosen.offsetTop - list.offsetTop + chosen.offsetHeight - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below + 6;
}
function renderCompletion() {
  const s = sample(), [sign, look, word] = verdict(s);
  const fact = (name, value) => element('span', {}, name + ' ', element('b', {}, value));
  $('verdict').replaceChildren(element('span', {class: look}, `${sign} ${word}`), fact('reward', s.reward === null ? '–' : s.reward.toFixed(3)),
    fact('advantage', signed(s.advantage, 3)), fact('tokens', String(s.tokens.length)), fact('ended by', s.finish_reason ?? '–'),
    ...(s.cause ? [fact('cause', visible(s.cause))] : []));
  $('tokens').replaceChildren(...s.tokens.map((token, i) => {
    const span = element('span', {class: /^<.*>$/s.test(token) ? 'token markup' : 'token', 'data-token': i}, visible(token));
    span.style.backgroundColor = tint(s, i);
    return span;
  }));
  $('parts').replaceChildren(...Object.entries(s.parts).map(([name, value]) =>
    element('span', {class: 'part'}, name + ' ', element('b', {}, value === null ? '–' : String(+value.toFixed(4))))));
  renderToken();
}
function renderToken() {
  const s = sample(), spans = $('tokens').children;
  for (const span of spans) span.classList.remove('current');
  if (VIEW.token === null) { $('token-line').textContent = ''; return; }
  const span = spans[VIEW.token];
  span.classList.add('current');
  span.scrollIntoView({block: 'nearest'});
  $('token-line').textContent = `token ${VIEW.token + 1} “${visible(s.tokens[VIEW.token])}” · ` + facts(s, VIEW.token).map(([name, value]) => `${name} ${value}`).join(' · ');
}
function render() {
  renderChoices();
  renderProblem();
  renderSamples();
  renderCompletion();
}

const clamp = (value, count) => Math.max(0, Math.min(count - 1, Number.isInteger(value) || value === Infinity ? value : 0));
// Changes the state. A new stage starts at its last step; a new step or group starts at its first completion.
function go(change, isWritten = true) {
  if ('stage' in change) Object.assign(VIEW, {step: Infinity, group: 0, sample: 0, token: null});
  if ('step' in change) Object.assign(VIEW, {sample: 0, token: null});
  if ('group' in change) Object.assign(VIEW, {sample: 0, token: null});
  if ('sample' in change) VIEW.token = null;
  Object.assign(VIEW, change);
  VIEW.stage = clamp(VIEW.stage, ROLLOUTS.length);
  VIEW.step = clamp(VIEW.step, steps().length);
  VIEW.group = clamp(VIEW.group, steps()[VIEW.step].groups.length);
  VIEW.sample = clamp(VIEW.sample, group().samples.length);
  hideTip();
  render();
  if (!isWritten) return;
  const stage = encodeURIComponent(ROLLOUTS[VIEW.stage].stage);
  history.replaceState(null, '', `#stage=${stage}&step=${steps()[VIEW.step].step}&group=${VIEW.group}&sample=${VIEW.sample}&colour=${VIEW.colour}`);
}
function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1)), change = {};
  const stage = ROLLOUTS.findIndex((s) => s.stage === hash.get('stage'));
  if (stage >= 0) change.stage = stage;
  const step = ROLLOUTS[change.stage ?? VIEW.stage].steps.findIndex((s) => String(s.step) === hash.get('step'));
  if (step >= 0) change.step = step;
  for (const key of ['group', 'sample']) if (hash.has(key)) change[key] = parseInt(hash.get(key), 10);
  if (['advantage', 'logprob'].includes(hash.get('colour'))) change.colour = hash.get('colour');
  return change;
}

function listenToViewer() {
  $('stage-select').addEventListener('change', (event) => go({stage: +event.target.value}));
  $('step-select').addEventListener('change', (event) => go({step: +event.target.value}));
  $('group-select').addEventListener('change', (event) => go({group: +event.target.value}));
  $('step-back').addEventListener('click', () => go({step: VIEW.step - 1}));
  $('step-on').addEventListener('click', () => go({step: VIEW.step + 1}));
  $('group-back').addEventListener('click', () => go({group: VIEW.group - 1}));
  $('group-on').addEventListener('click', () => go({group: VIEW.group + 1}));
  for (const colour of ['advantage', 'logprob']) $('colour-' + colour).addEventListener('change', () => go({colour}));
  addEventListener('hashchange', () => go(readHash(), false));
  $('samples').addEventListener('keydown', (event) => {
    const move = {ArrowUp: -1, ArrowDown: 1, Home: -1e9, End: 1e9}[event.key];
    if (move === undefined) return;
    event.preventDefault();
    go({sample: clamp(VIEW.sample + move, group().samples.length)});
  });
  $('tokens').addEventListener('keydown', (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9}[event.key];
    if (event.key === 'Escape') { VIEW.token = null; renderToken(); }
    if (move === undefined) return;
    event.preventDefault();
    VIEW.token = clamp((VIEW.token ?? (move < 0 ? sample().tokens.length : -1)) + move, sample().tokens.length);
    renderToken();
  });
  $('tokens').addEventListener('pointermove', (event) => {
    const span = event.target.closest('.token');
    if (!span) return hideTip();
    const i = +span.dataset.token, s = sample();
    showTip(event.clientX, event.clientY, `“${visible(s.tokens[i])}”`, facts(s, i));
  });
  $('tokens').addEventListener('pointerleave', hideTip);
  addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.('select, input, .plot')) return;
    const change = {'[': {step: VIEW.step - 1}, ']': {step: VIEW.step + 1}, g: {group: VIEW.group + 1}, G: {group: VIEW.group - 1},
      c: {colour: VIEW.colour === 'advantage' ? 'logprob' : 'advantage'}}[event.key];
    if (change) go(change);
  });
}

if (ROLLOUTS.length) {
  // After the first charts of the last stage with rollouts.
  const number = 1 + DATA.stages.findIndex((s) => s.name === ROLLOUTS[ROLLOUTS.length - 1].stage);
  document.querySelector(`#stage-${number} > .chart-section`)?.after($('viewer'));
  $('viewer').hidden = false;
  listenToViewer();
  go(readHash(), false);
}
document.documentElement.dataset.ready = 'true';
