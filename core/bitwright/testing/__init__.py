"""The conformance kits that third parties subclass."""
