"""Several replicas of one server, on Ray Serve: `pip install "loraplex[ray]"`, `loraplex serve --replicas N`."""
