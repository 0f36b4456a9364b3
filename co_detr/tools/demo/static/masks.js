// Masks in COCO's run-length form as shapes: an SVG path serves the page and the saved picture.

// The lengths of the runs, of background and object in turn, column after column.
function runLengths({ counts }) {
  const lengths = [];
  for (let place = 0; place < counts.length; ) {
    // Five bits in each character, the last one without the sixth; the fifth of it is the sign.
    let [value, shift, bits] = [0, 0, 0];
    do {
      bits = counts.charCodeAt(place++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    // From the third one on: the difference to the one before the last.
    lengths.push(lengths.length > 2 ? value + lengths.at(-2) : value);
  }
  return lengths;
}

// For every column that has some, the [top, bottom] of its runs, one after the other in a list.
function columnsOf({ size: [height], counts }) {
  const columns = new Map();
  let place = 0;
  runLengths({ counts }).forEach((length, index) => {
    const end = place + length;
    while (index % 2 && place < end) {
      const column = Math.floor(place / height);
      const last = Math.min(end, (column + 1) * height);
      if (!columns.has(column)) columns.set(column, []);
      columns.get(column).push(place - column * height, last - column * height);
      place = last;
    }
    place = end;
  });
  return columns;
}

// The outline of a mask as the `d` of an SVG path, in pixels of the image; "" if it is empty.
export function outline(segmentation) {
  const columns = columnsOf(segmentation);
  const [height] = segmentation.size;
  const key = (x, y) => x * (height + 1) + y;
  const edges = new Map(); // where an edge starts -> where such edges end
  const add = (x0, y0, x1, y1) => {
    const start = key(x0, y0);
    if (!edges.has(start)) edges.set(start, []);
    edges.get(start).push([x1, y1]);
  };
  // With the object to the right of every edge.
  for (const [x, runs] of columns) {
    for (let i = 0; i < runs.length; i += 2) {
      add(x, runs[i], x + 1, runs[i]);
      add(x + 1, runs[i + 1], x, runs[i + 1]);
    }
    addSides(x, columns.get(x - 1) ?? [], runs, add);
    if (!columns.has(x + 1)) addSides(x + 1, runs, [], add);
  }
  return [...loops(edges, key)].join("");
}

// The edges between two neighboring columns, where only one of them is of the object.
function addSides(x, left, right, add) {
  const places = [...left, ...right].sort((a, b) => a - b);
  let [i, j] = [0, 0]; // how many runs' ends of both are passed; odd inside of a run
  for (let k = 0; k + 1 < places.length; k++) {
    while (left[i] <= places[k]) i++;
    while (right[j] <= places[k]) j++;
    const [top, bottom] = [places[k], places[k + 1]];
    if (top === bottom || i % 2 === j % 2) continue;
    if (i % 2) add(x, top, x, bottom);
    else add(x, bottom, x, top);
  }
}

function* loops(edges, key) {
  for (const [first, ends] of edges) {
    while (ends.length) {
      const points = [];
      let point = ends.pop();
      points.push(point);
      while (key(...point) !== first) {
        point = edges.get(key(...point)).pop();
        points.push(point);
      }
      yield `M${points.map((each) => each.join(" ")).join("L")}Z`;
    }
  }
}
