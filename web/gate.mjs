// The gate as core/key_lock.py has it, so that a chart can follow the dial without asking the server.

/** How far the gate is open, 0 to 1, for a word of this similarity to the concept. */
export const gate = (similarity, bias, temperature) => 1 / (1 + Math.exp((bias - similarity) / temperature))

/** What a dial of Gate Strength means. */
export function dialled({ strength, bias_mode, bias, temperature }) {
  return bias_mode === "raw"
    ? { bias, temperature, scale: 1, off: false }
    : { bias: 0.3, temperature: 0.1, scale: strength, off: strength === 0 }
}
