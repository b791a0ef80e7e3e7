// Arrays as the API sends them: a shape, a type, and little-endian bytes in base64.

/** Returns {shape, data: Float32Array}. */
export function decodeArray({ shape, dtype, data }) {
  const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  if (dtype === "float32") return { shape, data: new Float32Array(bytes.buffer) };
  if (dtype === "float16") return { shape, data: Float32Array.from(new Uint16Array(bytes.buffer), halfToFloat) };
  throw new Error(`an array of type ${dtype} can't be shown`);
}

function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
