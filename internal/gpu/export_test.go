package gpu

// Compare is compare, for tests that compare a report with RIMs of others.
var Compare = compare
