"""What every room imports and no GPU process needs: errors, storage, uploads, messages, which code runs."""
