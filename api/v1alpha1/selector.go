package v1alpha1

// LabelSelector selects objects by their labels: all that is asked for must hold. An empty one selects everything.
type LabelSelector struct {
	// Labels that must be there with exactly these values: up to 16, names of up to 317 characters. Default: none.
	// +optional
	// +kubebuilder:validation:MaxProperties=16
	// +kubebuilder:validation:XValidation:rule="self.all(name, size(name) > 0 && size(name) <= 317)",message="a label's name has 1 to 317 characters"
	MatchLabels map[string]LabelValue `json:"matchLabels,omitempty"`
	// What else labels must be: up to 16 requirements. Default: none.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	MatchExpressions []LabelRequirement `json:"matchExpressions,omitempty"`
}

// LabelValue is a label's value.
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:Pattern=`^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$`
type LabelValue string

// LabelRequirement is about one label.
//
// +kubebuilder:validation:XValidation:rule="(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",message="In and NotIn need values; Exists and DoesNotExist take none"
type LabelRequirement struct {
	// Name of the label, 1 to 317 characters. Required.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=317
	// +kubebuilder:validation:Pattern=`^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`
	Key string `json:"key"`
	// In: the label has one of the values. NotIn: it has none of them, or is not there. Exists, DoesNotExist: it is there, or
	// not. Required.
	Operator LabelOperator `json:"operator"`
	// Values that In and NotIn compare with, up to 16. Default: none.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=16
	Values []LabelValue `json:"values,omitempty"`
}

// LabelOperator is how a requirement compares.
// +kubebuilder:validation:Enum=In;NotIn;Exists;DoesNotExist
type LabelOperator string
