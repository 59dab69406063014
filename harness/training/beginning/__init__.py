"""What a launch begins with. Begin at `continuation`: what it continues from, as all ranks agree.

`resume` compares with the run before and names the class, `remote` fetches what only the store has. A first
launch may begin with another run's checkpoint (`start`; `parent` opens it). `own_policy` is the policy that
the run is made under, `folder_lock` keeps a second job out of its folder.
"""
