"""Who may sign what. Begin at `rules`, which are what every verification asks.

`reader` reads them from a YAML file, whose shape is `policy_schema` and whose single values `fields` checks.
`draft` writes such a file from public keys and `oddities` says what is odd in one. `canonical` is the one
form in which a run keeps and names its policy, and `fit` tells whether what a run is about to sign can
satisfy it. `rotation` is the statement by which a key hands over to the next.
"""
