"""The Switchable Normalization layer: modules, the functional form, gates, and backends that compute it."""
