"""The HTTP API: routes, the bodies that they take, and the answers that they give."""
