// sigstore-js on one bundle: node independent.mjs BUNDLE KEY.pem, from a folder with @sigstore/verify installed.
// No trust root is fetched: the key is the one that was given, and nothing vouches for the time.
import { createPublicKey } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const installed = createRequire(`${process.cwd()}/`);
const { bundleFromJSON } = installed("@sigstore/bundle");
const { toSignedEntity, Verifier } = installed("@sigstore/verify");
const [bundle, key] = process.argv.slice(2).map((path) => readFileSync(path, "utf8"));
const publicKey = createPublicKey(key);
const trust = {
  certificateAuthorities: [], ctlogs: [], timestampAuthorities: [], tlogs: [],
  publicKey: () => ({ publicKey, validFor: () => true }),
};
const thresholds = { ctlogThreshold: 0, tlogThreshold: 0, tsaThreshold: 0 };
new Verifier(trust, thresholds).verify(toSignedEntity(bundleFromJSON(JSON.parse(bundle))));
