"""What the tests share: real processes, an API client, a link that can be cut, and a contract for import-linter."""
