// The page works without this script; it adds sorting, filtering, choosing and zooming.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const read = (id) => {
    const block = document.getElementById(id);
    return block ? JSON.parse(block.textContent) : null;
  };

  // ---- theme -------------------------------------------------------------------------------
  const themes = [["", "as the system"], ["light", "light"], ["dark", "dark"]];
  const theme = document.getElementById("theme");
  let themeNumber = 0;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    themeNumber = (themeNumber + 1) % themes.length;
    const [name, title] = themes[themeNumber];
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    theme.textContent = `Theme: ${title}`;
  });

  // ---- tables ------------------------------------------------------------------------------
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    const key = cell.dataset.key ?? cell.textContent.trim();
    const value = Number(key);
    return key === "" ? null : Number.isNaN(value) ? key : value;
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null); // unknown ones last
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  };
  for (const table of all("table.sortable")) {
    all("button.sort", table).forEach((button, column) => {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const down = head.getAttribute("aria-sort") === "ascending";
        all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].map((row, index) => [keyOf(row, column), index, row]);
        rows.sort((a, b) => {
          const order = compare(a[0], b[0]);
          const turned = down && a[0] !== null && b[0] !== null ? -order : order;
          return turned || a[1] - b[1];
        });
        table.tBodies[0].append(...rows.map((entry) => entry[2]));
      });
    });
  }
  for (const field of all(".filter input")) {
    const rows = all("tbody tr", field.closest(".tablebox"));
    const count = field.parentElement.querySelector("output");
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
      const shown = rows.filter((row) => !row.hidden).length;
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
    });
  }

  // ---- copying and saving ------------------------------------------------------------------
  for (const button of all("button.copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code); // no clipboard here: the user copies it
        button.textContent = "Selected";
      }
    });
  }
  const save = document.getElementById("save");
  if (save) {
    save.hidden = false;
    save.addEventListener("click", () => {
      const link = document.createElement("a");
      const content = JSON.stringify(read("plan") ?? read("sweep"), null, 1);
      link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
      link.download = read("plan") ? "plan.json" : "what-if.json";
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  // ---- mesh --------------------------------------------------------------------------------
  const mesh = document.getElementById("mesh");
  if (mesh) {
    const facts = read("mesh-data");
    const devices = all(".device", mesh);
    const says = document.getElementById("mesh-says");
    const placeOf = (rank) => {
      const place = {};
      for (const [axis, size] of [...facts.mesh].reverse()) {
        place[axis] = rank % size;
        rank = Math.floor(rank / size);
      }
      return place;
    };
    const names = {
      pipeline: "pipeline rank", data_replicate: "data replica", data_shard: "data shard",
      context: "context rank", tensor: "tensor rank",
    };
    const group = (rank, axis) => {
      let stride = 1;
      for (const [name, size] of [...facts.mesh].reverse()) {
        if (name === axis) {
          const first = rank - (Math.floor(rank / stride) % size) * stride;
          return Array.from({ length: size }, (_, i) => first + i * stride);
        }
        stride *= size;
      }
      return [];
    };
    const listed = (ranks) => (ranks.length > 12
      ? `${ranks.slice(0, 6).join(", ")}, … ${ranks.at(-1)} (${ranks.length})` : ranks.join(", "));
    const axisNow = () => document.querySelector("#mesh-by input:checked").value;
    const choose = (device) => {
      const rank = Number(device.dataset.rank);
      const place = placeOf(rank);
      const mates = new Set(group(rank, axisNow()));
      mesh.classList.add("choosing");
      for (const other of devices) {
        other.classList.toggle("chosen", other === device);
        other.classList.toggle("mate", mates.has(Number(other.dataset.rank)));
        other.tabIndex = other === device ? 0 : -1;
      }
      const held = facts.stages.filter((stage) => stage.rank === place.pipeline);
      const where = `Device ${rank}, number ${rank % facts.perNode} of node ${Math.floor(rank / facts.perNode)}: `;
      const axes = facts.mesh.filter(([, size]) => size > 1);
      const lines = [where + (axes.map(([axis]) => `${names[axis]} ${place[axis]}`).join(", ") || "the only device")];
      const spans = held.map((s) => (s.first === s.last ? s.first : `${s.first} … ${s.last}`));
      lines.push(`Holds ${held.reduce((sum, s) => sum + s.layers, 0)} layers: ${spans.join("; ")}`);
      for (const [axis] of axes) lines.push(`Its group of ${names[axis]}s: devices ${listed(group(rank, axis))}`);
      says.textContent = lines.join("\n");
    };
    const colour = () => {
      const axis = axisNow();
      for (const device of devices) {
        const number = placeOf(Number(device.dataset.rank))[axis];
        device.setAttribute("class", `device m${number % 8}`);
        device.querySelector("text").textContent = number;
      }
      mesh.classList.remove("choosing");
    };
    all("#mesh-by input").forEach((input) => input.addEventListener("change", colour));
    devices.forEach((device, index) => {
      device.addEventListener("pointerenter", () => choose(device));
      device.addEventListener("click", () => device.focus());
      device.addEventListener("focus", () => choose(device));
      device.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: facts.perNode, ArrowUp: -facts.perNode }[event.key];
        if (!step) return;
        event.preventDefault();
        devices[Math.min(devices.length - 1, Math.max(0, index + step))].focus();
      });
    });
    if (devices.length) devices[0].tabIndex = 0;
  }

  // ---- timeline ----------------------------------------------------------------------------
  const timeline = document.getElementById("timeline");
  if (timeline) {
    const svg = timeline.querySelector("svg");
    const [, , whole, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const seconds = Number(timeline.dataset.seconds);
    const ticks = all(".axis span", timeline);
    let left = 0;
    let width = whole;
    const words = (value) => (value >= 1 ? `${value.toFixed(3)} s` : `${(value * 1e3).toPrecision(3)} ms`);
    const show = () => {
      width = Math.min(whole, Math.max(whole / 2000, width));
      left = Math.min(whole - width, Math.max(0, left));
      timeline.classList.toggle("close", width < whole / 4);
      svg.setAttribute("viewBox", `${left} 0 ${width} ${height}`);
      [left, left + width / 2, left + width].forEach((at, i) => {
        ticks[i].textContent = at === 0 ? "0 s" : words((at / whole) * seconds);
      });
    };
    const zoom = (factor) => { left += (width * (1 - factor)) / 2; width *= factor; };
    const moves = {
      whole: () => { left = 0; width = whole; },
      begin: () => { width = whole / 8; left = 0; },
      end: () => { width = whole / 8; left = whole; },
      in: () => zoom(0.5), out: () => zoom(2),
      left: () => { left -= width / 4; }, right: () => { left += width / 4; },
    };
    all("[data-zoom]").forEach((button) => button.addEventListener("click", () => {
      moves[button.dataset.zoom]();
      show();
    }));
    timeline.addEventListener("keydown", (event) => {
      const name = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", Home: "begin", End: "end", 0: "whole" }[event.key];
      if (!name) return;
      event.preventDefault();
      moves[name]();
      show();
    });
    show();
  }

  // ---- points of charts: the row of the table that belongs to them ----------------------------
  for (const point of all(".point[data-row]")) {
    const go = () => {
      const row = document.getElementById(point.dataset.row);
      all("tr.chosen").forEach((other) => other.classList.remove("chosen"));
      row.classList.add("chosen");
      row.hidden = false;
      row.scrollIntoView({ block: "center" });
    };
    point.addEventListener("click", go);
    point.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      go();
    });
  }
})();
