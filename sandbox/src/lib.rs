//! Runs one command in Linux namespaces made for it.
