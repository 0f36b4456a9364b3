// Downloads of what is shown, made in the browser.

import { outline } from "./masks.js";

const MASK_OPACITY = 0.4; // as in predict.py's pictures

// The picture in its own size, with boxes, and masks if they are shown; lines and text grow with it
// as in predict.py's pictures.
export async function savePicture(picture, annotations, classes, fileName, masked) {
  const canvas = document.createElement("canvas");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const draw = canvas.getContext("2d");
  draw.drawImage(picture, 0, 0);
  const shorter = Math.min(canvas.width, canvas.height);
  const size = Math.max(11, Math.round(shorter / 40));
  draw.lineWidth = Math.max(1, Math.round(shorter / 250));
  draw.font = `${size}px "DejaVu Sans", system-ui, sans-serif`;
  draw.textBaseline = "middle";
  const ranked = [...annotations].reverse(); // the best ones on top
  if (masked) drawMasks(draw, annotations, classes);
  for (const { bbox, category_id } of ranked) {
    draw.strokeStyle = classes[category_id - 1].color;
    draw.strokeRect(...bbox);
  }
  for (const { bbox: [x, y], category_id, score } of ranked) {
    const { name, color, text } = classes[category_id - 1];
    const label = `${name} ${score.toFixed(2)}`;
    const [width, height] = [draw.measureText(label).width + 6, size + 4];
    const left = Math.max(0, Math.min(x, canvas.width - width));
    const top = y >= height ? y - height : Math.max(0, y);
    draw.fillStyle = color;
    draw.fillRect(left, top, width, height);
    draw.fillStyle = text;
    draw.fillText(label, left + 3, top + height / 2);
  }
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  if (!blob) {
    throw new Error(
      `This browser cannot make a picture of ${canvas.width} x ${canvas.height} pixels: ` +
        "use predict.py, or another browser.",
    );
  }
  download(blob, `${stem(fileName)}_boxes.jpg`);
}

function drawMasks(draw, annotations, classes) {
  const withMasks = annotations.filter(({ segmentation }) => segmentation);
  // Small ones on top.
  for (const { segmentation, category_id } of withMasks.sort((a, b) => b.area - a.area)) {
    const shape = new Path2D(outline(segmentation));
    draw.fillStyle = draw.strokeStyle = classes[category_id - 1].color;
    draw.globalAlpha = MASK_OPACITY;
    draw.fill(shape, "evenodd");
    draw.globalAlpha = 1;
    draw.stroke(shape);
  }
}

// COCO format, with masks in run-length form, without the annotations that are not shown.
export function saveJson(coco, annotations, fileName) {
  const content = JSON.stringify({ ...coco, annotations }, null, 1);
  download(new Blob([content], { type: "application/json" }), `${stem(fileName)}.json`);
}

function stem(fileName) {
  return fileName.replace(/\.[^.]*$/, "") || "image";
}

function download(blob, fileName) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = fileName;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
