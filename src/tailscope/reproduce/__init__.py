"""The paper's experiments from one command, and our results beside its numbers and claims (`tailscope.paper`)."""
