"""The small problems inside of the methods: T x T, fixed work, no host synchronisation."""
