// The boxes and masks on the picture, their list and their counts. All boxes are made once for an
// image; the slider only hides and shows them.

import { outline } from "./masks.js";

// Pixels of the width of the picture for each label; with more boxes, only the one pointed at has one.
const PER_LABEL = 20;

export class BoxView {
  // classes: [{ name, color, text }], category id 1 first.
  constructor(classes) {
    this.classes = classes;
    this.layer = document.getElementById("boxes");
    this.masks = document.getElementById("masks");
    this.list = document.getElementById("list");
    this.legend = document.getElementById("legend");
    this.clear();
    for (const [parent, start, end] of [
      [this.layer, "pointerover", "pointerleave"],
      [this.list, "pointerover", "pointerleave"],
      [this.list, "focusin", "focusout"],
    ]) {
      parent.addEventListener(start, (event) => this.#point(event.target));
      parent.addEventListener(end, () => this.#point(null));
    }
    // A tap on a phone: shows where the box is in the list, and where on the picture.
    this.layer.addEventListener("click", (event) => {
      this.#item(event.target)?.row.scrollIntoView({ block: "nearest" });
    });
    this.list.addEventListener("click", () => this.layer.scrollIntoView({ block: "nearest" }));
  }

  clear() {
    this.items = [];
    this.seconds = 0;
    this.layer.replaceChildren();
    this.masks.replaceChildren();
    this.list.replaceChildren();
    this.legend.replaceChildren();
  }

  // coco: an annotation file of one image, with scores. `filter` has to follow.
  show(coco, seconds) {
    this.clear();
    this.seconds = seconds;
    const [image] = coco.images;
    const ranked = [...coco.annotations].sort((a, b) => b.score - a.score);
    this.items = ranked.map((annotation) => this.#make(annotation, image));
    // Small ones last, so that the pointer reaches those inside of others.
    const area = ({ annotation }) => annotation.bbox[2] * annotation.bbox[3];
    const bySize = [...this.items].sort((a, b) => area(b) - area(a));
    this.layer.replaceChildren(...bySize.map(({ box }) => box));
    this.masks.setAttribute("viewBox", `0 0 ${image.width} ${image.height}`);
    this.masks.replaceChildren(...bySize.flatMap(({ mask }) => mask ?? []));
    document.getElementById("with-masks").hidden = !this.masks.childElementCount;
    this.list.replaceChildren(...this.items.map(({ row }) => row));
  }

  // Shows the boxes whose score is at least `threshold`, from 0 to 1.
  filter(threshold) {
    for (const item of this.items) {
      const hidden = item.annotation.score < threshold;
      for (const element of [item.box, item.row, item.mask]) element?.toggleAttribute("hidden", hidden);
    }
    const visible = this.visible();
    this.layer.classList.toggle("crowded", visible.length * PER_LABEL > this.layer.clientWidth);
    this.#count(visible);
    document.getElementById("threshold").textContent = threshold.toFixed(2);
    const noun = this.items.length === 1 ? "box" : "boxes";
    document.getElementById("summary").textContent =
      `${visible.length} of ${this.items.length} ${noun}, found in ${this.seconds.toFixed(2)} s`;
  }

  showMasks(shown) {
    this.masks.toggleAttribute("hidden", !shown);
  }

  // The annotations that are shown, best first.
  visible() {
    return this.items.filter(({ box }) => !box.hidden).map(({ annotation }) => annotation);
  }

  #make(annotation, image) {
    const { name, color, text } = this.classes[annotation.category_id - 1];
    const [x, y, width, height] = annotation.bbox;
    const score = annotation.score.toFixed(2);

    const box = document.createElement("div");
    box.className = "box";
    box.classList.toggle("inside", y < 0.06 * image.height);
    box.classList.toggle("leftwards", x > 0.75 * image.width);
    const label = document.createElement("span");
    label.textContent = `${name} ${score}`;
    box.append(label);
    const percent = (part, whole) => `${(100 * part) / whole}%`;
    box.style.left = percent(x, image.width);
    box.style.top = percent(y, image.height);
    box.style.width = percent(width, image.width);
    box.style.height = percent(height, image.height);

    const row = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    const [title, figure] = [document.createElement("span"), document.createElement("span")];
    title.textContent = name;
    figure.textContent = score;
    figure.className = "figure";
    button.append(title, figure);
    row.append(button);

    let mask = null;
    if (annotation.segmentation) {
      mask = document.createElementNS(this.masks.namespaceURI, "path");
      mask.setAttribute("d", outline(annotation.segmentation));
    }
    for (const element of [box, row, mask]) if (element) paint(element, color, text);
    return { annotation, box, row, mask };
  }

  #count(visible) {
    const counts = new Map();
    for (const { category_id } of visible) counts.set(category_id, (counts.get(category_id) ?? 0) + 1);
    const chips = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([category, count]) => {
      const { name, color, text } = this.classes[category - 1];
      const chip = document.createElement("li");
      chip.textContent = `${name} ${count}`;
      paint(chip, color, text);
      return chip;
    });
    this.legend.replaceChildren(...chips);
  }

  #item(element) {
    return this.items.find(({ box, row }) => box.contains(element) || row.contains(element));
  }

  #point(element) {
    const pointed = element && this.#item(element);
    for (const item of this.items) {
      item.box.classList.toggle("active", item === pointed);
      item.row.classList.toggle("active", item === pointed);
      item.mask?.classList.toggle("active", item === pointed);
    }
    for (const layer of [this.layer, this.masks]) layer.classList.toggle("pointing", Boolean(pointed));
  }
}

function paint(element, color, text) {
  element.style.setProperty("--color", color);
  element.style.setProperty("--on-color", text);
}
