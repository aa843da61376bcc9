package lds

// Runtime is what the listeners and secrets need of Envoy's runtime; it belongs into the bootstrap's static layer.
// Envoy's default of 100 instructions refuses the patterns of identity rules, and many that users may write: their
// length is bounded before (maxPattern here, 256 characters in resolve).
func Runtime() map[string]float64 {
	return map[string]float64{"re2.max_program_size.error_level": 1 << 16}
}
