// Where the page gets its data: from the server that it came from, or from the file that it is in.

const embedded = document.getElementById("data");
const stored = embedded && JSON.parse(embedded.textContent);
export const isLive = !stored;

export async function get(path, query = {}) {
  if (stored) return fromFile(path, query);
  const words = new URLSearchParams(query).toString();
  return answerOf(await fetch(`api/${path}${words ? `?${words}` : ""}`));
}

export async function post(path) {
  return answerOf(await fetch(`api/${path}`, { method: "POST" }));
}

async function answerOf(response) {
  const found = await response.json();
  if (!response.ok) throw new Error(found.error || response.statusText);
  return found;
}

function fromFile(path, query) {
  const [what, run] = path.split("/");
  if (what === "trajectories") return selected(stored.trajectories[run], query);
  const key = what === "trajectory" && query.sequence > 0 ? `${path}?${query.sequence}` : path;
  if (!(key in stored)) throw new Error("this file does not hold that trajectory");
  return stored[key];
}

const ties = (a, b, sign) =>
  b.kind.localeCompare(a.kind) || sign * (a.step - b.step) || a.line - b.line;

// What the server does with a query, on the rows that the file holds.
export function selected(whole, query) {
  const tests = [];
  for (const [name, value] of Object.entries(query)) {
    const bounds = /^(-?[\d.e+-]*):(-?[\d.e+-]*)$/.exec(value);
    if (bounds) {
      const low = bounds[1] === "" ? -Infinity : +bounds[1];
      const high = bounds[2] === "" ? Infinity : +bounds[2];
      tests.push((row) => row[name] !== null && row[name] >= low && row[name] <= high);
    } else if (["kind", "outcome", "ended", "stop"].includes(name) && value)
      tests.push((row) => row[name] === value);
  }
  const text = (query.text || "").toLowerCase();
  const parts = (row) => [row.task_id, row.answer, row.preview];
  if (text) tests.push((row) => parts(row).some((part) => (part || "").toLowerCase().includes(text)));
  const rows = whole.rows.filter((row) => tests.every((test) => test(row)));
  const sort = query.sort || "-step";
  const name = sort.replace("-", "");
  const sign = sort.startsWith("-") ? -1 : 1;
  rows.sort((a, b) => {
    if (a[name] === null || b[name] === null) return (a[name] === null) - (b[name] === null);
    return a[name] < b[name] ? -sign : a[name] > b[name] ? sign : ties(a, b, sign);
  });
  const offset = +(query.offset || 0);
  const shown = rows.slice(offset, offset + +(query.limit || 200));
  return { total: rows.length, offset, rows: shown, summary: whole.summary };
}
