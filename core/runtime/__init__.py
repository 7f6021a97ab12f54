"""The only part of core that imports Ray: each stage as it runs on a cluster."""
