"""Keys, and signatures by them. Begin at `keys`: who a signer is, and where the private half lies.

That may be a file, `ssh_agent` or a `pkcs11_token`; `keyless` is for who keeps no key. What is signed:
`envelope` is one signature over a statement (DSSE), `model_signature` is model.sig.
"""
