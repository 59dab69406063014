// sigstore-js on a log: node independent_log.mjs < FILE.json, from a folder with @sigstore/verify installed.
// FILE.json: the note, the keys that may sign it (PEM, and the id that the note names them by, hex), and each
// record (base64) with its inclusion proof (base64). The code is what sigstore-js asks of Rekor's entries; the
// package does not export it by name. Leaves with 1, and why, when it rejects.
import { createPublicKey } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

const installed = createRequire(`${process.cwd()}/`);
const inside = (name) => join(dirname(installed.resolve("@sigstore/verify")), "tlog", name);
const { verifyCheckpoint } = installed(inside("checkpoint.js"));
const { verifyMerkleInclusion } = installed(inside("merkle.js"));
const { note, origin, keys, records } = JSON.parse(readFileSync(0, "utf8"));
const logs = keys.map(({ pem, id }) => (
  { publicKey: createPublicKey(pem), logID: Buffer.from(id, "hex"), baseURL: origin }));
const bytes = (text) => Buffer.from(text, "base64");
try {
  records.forEach(({ body, hashes }, index) => {
    const inclusionProof = { logIndex: String(index), hashes: hashes.map(bytes), checkpoint: { envelope: note } };
    const entry = { canonicalizedBody: bytes(body), inclusionProof };
    verifyMerkleInclusion(entry, verifyCheckpoint(entry, logs));
  });
} catch (error) {
  if (error.name !== "VerificationError") throw error;
  console.log(error.message);
  process.exitCode = 1;
}
